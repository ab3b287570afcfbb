"""One module per figure that README quotes: `python -m benchmarks.<name> [--json]`."""

import llip  # noqa: F401 (sets OMP_WAIT_POLICY, which must precede torch)
