"""Many requests at once: engine/ answers them, http/ speaks OpenAI's protocol, batch/ reads and writes files.

The engine knows no HTTP; the server and the batches know only the names of `engine`. Batches in OpenAI's form are
answered by the app of `http`, in the same process.
"""
