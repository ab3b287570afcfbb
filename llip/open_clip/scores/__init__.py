"""Exact text-conditioned scores of every image against every text, in tiles."""
