"""Statistics of mixture tokens on a dataset: usage, entropies, variances, spectra, alarms.

llip diagnose CHECKPOINT --data PATTERN [--caption-keys KEYS] [--out DIR]
"""
