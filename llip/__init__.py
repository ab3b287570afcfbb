"""Llip: vision-language models whose image features depend on the caption.

The names below are what a notebook types; each is imported when it is first used, so that `import llip` costs nothing.
"""

import importlib
import os

# Before torch is loaded: waiting threads sleep. Spinning ones, the default of some OpenMP libraries,
# make small parallel regions 8 times slower where more threads than cores are busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.2.0.dev0"

_EXPORTS = {
    "Llip": "llip.open_clip.model",
    "create_model_and_transforms": "llip.open_clip.factory",
    "get_tokenizer": "llip.open_clip.factory",
    "list_models": "llip.open_clip.factory",
    "list_further_models": "llip.open_clip.factory",
    "load_pretrained": "llip.open_clip.factory",
    "open_model": "llip.open_clip.factory",
    "Matches": "llip.open_clip.objectives.matches",
    "sigmoid_loss": "llip.open_clip.objectives.losses",
    "softmax_loss": "llip.open_clip.objectives.losses",
    "UserError": "llip.errors",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'llip' has no attribute {name!r}; it has {', '.join(_EXPORTS)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
