"""The C++ kernels of the CPU: their sources, and what compiles and loads them."""
