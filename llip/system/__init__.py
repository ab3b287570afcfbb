"""What knows nothing of the project: paths, cores, GPUs, processes that end with their parent."""
