"""CUDA C++ of the kernels for NVIDIA cards from Ampere on."""
