"""A small image search over a folder, on exact text-conditioned scores.

llip search index DIR --checkpoint CHECKPOINT
llip search query DIR/.llip_index "a red star on the left"
"""
