"""Zero-shot evaluation programs over `llip.clipeval`: `llip eval`, `llip compare`, and evaluation as a SLURM job."""

import llip  # noqa: F401 (sets OMP_WAIT_POLICY, which must precede torch)
