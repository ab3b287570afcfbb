"""Frozen features, computed once, that stand for images and captions in training."""
