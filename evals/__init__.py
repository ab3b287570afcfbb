"""Zero-shot evaluation programs over `llip.clipeval`: `llip eval`, `llip compare`, and evaluation as a SLURM job."""
