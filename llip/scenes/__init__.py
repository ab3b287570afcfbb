"""The embedded dataset: small rendered scenes, each with many captions that are all true and state different facts.

One vector per picture cannot be close to all of a picture's captions at once; text-conditioned pooling need not try.
Nothing here imports torch. `llip scenes --out DIR` writes the files; see `shards` for their layout.
"""

from llip.scenes.shards import ensure_scenes, write_scenes
from llip.scenes.sheet import contact_sheet

__all__ = ["contact_sheet", "ensure_scenes", "write_scenes"]
