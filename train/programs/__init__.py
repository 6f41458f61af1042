"""The programs that train and evaluate: phi3-train, phi3-evaluate and phi3-fetch-data.

A program is a module whose name ends in _main, with flags, progress bars and exit codes. Nothing imports a program.
"""
