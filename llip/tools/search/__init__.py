"""A small image search over a folder, on exact text-conditioned scores.

python -m llip.tools.search index DIR --checkpoint CHECKPOINT
python -m llip.tools.search query DIR/.llip_index "a red star on the left"
"""
