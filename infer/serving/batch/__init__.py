"""Files of requests, answered by the engine into files of answers."""
