"""FLOPs and activations of a model, by count."""
