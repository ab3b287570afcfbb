"""What the mixture tokens of a model do over a data set: usage, entropies, variances, spectra, alarms.

llip diagnose CHECKPOINT --data PATTERN [--caption-keys KEYS] [--out DIR]
"""
