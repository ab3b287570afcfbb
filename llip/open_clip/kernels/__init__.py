"""Triton kernels of the scores, for CUDA. Only `launch` and what it imports need triton."""
