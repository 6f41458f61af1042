"""The server: OpenAI's protocol over HTTP, in front of the engine.

app.py puts the endpoints together, one file each; service.py is what they share, fields/ reads requests, streams.py
sends answers while they are written, errors.py is what clients are told instead. gate/ stands before all of them.
"""
