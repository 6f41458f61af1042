"""GGUF files, llama.cpp's format: header, blocks of quantised weights, vocabulary; read and written.

Other packages use `header.read_header`, `reader.read_gguf` and `writer.save_gguf`; the last two need the extra `gguf`.
"""
