"""Imported by the process from which tests fork others (tests/forked.py): what their runs would import and read."""

import matplotlib.pyplot  # noqa: F401 - figures at the end of a run
import PIL.Image

import llip.main
import llip.training.evaluation
import llip.training.setup
import llip.training.trainer  # noqa: F401
from llip.open_clip.tokenizer import create_tokenizer

PIL.Image.init()
for length in (12, 24):
    create_tokenizer({"context_length": length})
