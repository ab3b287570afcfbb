"""Training: data, processes, optimisation, checkpoints, and the loop that ties them together."""
