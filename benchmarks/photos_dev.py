"""Retrieval on the dev photographs from features that are computed once for all runs.

Shapes: N images, T captions, L features of an image, W their width, C width of the text encoder, K mixture tokens, D
embedding width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import llip
from llip.clipeval.dataset_types.shards import Retrieval
from llip.clipeval.retrieval import join, recalls, score_share
from llip.clipeval.scorer import Scorer
from llip.configs import Config
from llip.open_clip.model import Llip
from llip.open_clip.towers.text import frozen_text_features

_BATCH = 50  # images, or ten times as many captions


@dataclass(frozen=True)
class Frozen:
    """What the locked towers give: image features [N, L, W], caption features [T, C], and each caption's image [T]."""

    images: Tensor
    captions: Tensor
    owners: Tensor


class DevSet:
    """The evaluation set of all runs, which share their frozen towers."""

    def __init__(self, pattern: str, caption_key: str) -> None:
        """Take shards `folder/name-*.tar` whose captions are under `caption_key`, as in `json.captions`."""
        path = Path(pattern)
        self._data = Retrieval(path=path.parent, split=path.name, caption_key=caption_key)
        self._frozen: Frozen | None = None

    def evaluate(self, config: Config) -> dict[str, float]:
        """Return R@1, R@5 and R@10 of a finished run in both directions, as fractions, exact over all pairs."""
        model = llip.load_pretrained(config.folder / "checkpoints" / "latest.pt").eval()
        with torch.no_grad():
            if self._frozen is None:
                self._frozen = self._encode(model)
            h = torch.cat([model.encode_image_features(x) for x in self._frozen.images.split(10 * _BATCH)])
            t = model.encode_text_features(self._frozen.captions)
            scorer = Scorer(model, model.preprocess_val, model.tokenizer, torch.device("cpu"))
            images = torch.arange(len(h))
            share = score_share(scorer, h.float(), images, t.float(), self._frozen.owners)
        return recalls(join([share], self._frozen.owners))

    def _encode(self, model: Llip) -> Frozen:
        source = self._data.open()
        indices = range(len(source))
        images = []
        for start in indices[::_BATCH]:
            batch = [model.preprocess_val(source.load(i)[0]) for i in indices[start : start + _BATCH]]
            images.append(model.visual.frozen_features(torch.stack(batch)))
        texts = [(i, caption) for i, captions in enumerate(source.targets()) for caption in captions]
        tokens = model.tokenizer([caption for _, caption in texts])
        captions = [frozen_text_features(model.text, x) for x in tokens.split(10 * _BATCH)]
        return Frozen(torch.cat(images), torch.cat(captions), torch.tensor([i for i, _ in texts]))
