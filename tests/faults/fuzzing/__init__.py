"""Mutated inputs for every reader, read in processes that may crash, hang or eat memory, and what came of it.

A reader (reader.py; readers/ has all of them) makes a small valid input, and reads it as users do. mutations.py changes
the input by a seed: any_bytes.py anything, json_trees.py JSON, safetensors_headers.py and gguf_headers.py the fields of
headers, template_pieces.py templates, file_kinds.py what a file is. worker.py reads one input after another, pool.py
watches the workers, verdicts.py judges what they say, and table.py prints it.
"""
