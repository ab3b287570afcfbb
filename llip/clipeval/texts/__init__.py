"""Class names, prompts and their cached features."""
