"""What a model does with single images and captions: scores, weights over mixture tokens, where the tokens look.

llip explain CHECKPOINT --images A.jpg B.jpg --captions "a red star" "a blue ring" --out explained.png
"""
