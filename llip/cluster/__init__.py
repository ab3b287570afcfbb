"""Training and evaluation as SLURM jobs: options, checks, a snapshot of the code, and what each task runs."""
