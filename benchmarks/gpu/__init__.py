"""What only a GPU can show, in sections: `python -m benchmarks.gpu` (see docs/gpu.md)."""
