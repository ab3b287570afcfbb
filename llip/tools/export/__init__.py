"""Export a model: a folder with its card, a checkpoint for plain OpenCLIP, exported programs."""
