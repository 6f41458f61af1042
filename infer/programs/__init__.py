"""The programs that run models: phi3-generate, phi3-chat, phi3-serve, phi3-inspect, phi3-benchmark, phi3-quantize,
phi3-export and phi3-random-checkpoint.

A program is a module whose name ends in _main, with flags, progress bars and exit codes; flags.py has the flags that
several share, calls.py prints the calls of tools, files.py answers phi3-generate's files,
server.py is phi3-serve once its flags are read. Nothing imports a program.
"""
