"""Scores, weights over mixture tokens and attention maps of single images and captions.

llip explain CHECKPOINT --images A.jpg B.jpg --captions "a red star" "a blue ring" --out explained.png
"""
