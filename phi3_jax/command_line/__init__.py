"""What the programs in infer/programs/ and train/programs/ share: how they run, and how they show progress.

The only package of the library with flags and printing; nothing but programs imports it (tests/test_imports.py).
They use `program.run_program`, what `interrupts` offers, `progress.progress_bar`, and
what is in `model_flags`. streams.py is behind standard output; the commands begin in phi3_start.py.
"""
