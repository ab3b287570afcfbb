"""One module per figure that README quotes: `python -m benchmarks.<name> [--json]`."""
