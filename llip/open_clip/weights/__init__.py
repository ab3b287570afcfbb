"""Weights in: files of any layout, names, what was loaded."""
