"""Independent of the project: files, locks, paths, git, cores, GPUs, processes, programs."""
