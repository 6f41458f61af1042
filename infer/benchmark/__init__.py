"""Speed and memory of our generation, beside the machine's limits and beside other programs on the same weights.

Each side is a process of its own (processes.py): ours.py, and peer_process.py for llama.cpp and transformers, which
also runs in a Python without phi3_jax. rounds.py measures them in turns. phi3-benchmark uses these modules, and the
table of weights the arithmetic of roofline.py.
"""
