"""Retrieval between N images and T captions, several captions per image, from exact scores in blocks of images.

Shapes: B images of a block, N images of this process, T captions of all processes, D embedding width.
Only mixture tokens are kept; the N x T scores exist one block at a time, so memory beyond the features does not grow
with N.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from llip.clipeval.metrics import RECALLS, recall_at
from llip.clipeval.shortlist import Shortlist, candidate_scores
from llip.clipeval.zero_shot import Scorer

DEPTH = max(RECALLS)
BLOCK = 256
"""Images scored at once: bounds the B x T scores. The model projects all texts again for each block."""


@dataclass(frozen=True)
class RetrievalShare:
    """Results of one process's images, on the CPU.

    Attributes:
        images: indices of the images in the dataset [N].
        first_hits: rank of each image's best own caption among all captions [N], `DEPTH` when it is further down.
        best_scores, best_images: each caption's best images of this process, best first [T, <= DEPTH].
    """

    images: Tensor
    first_hits: Tensor
    best_scores: Tensor
    best_images: Tensor


def score_share(
    scorer: Scorer,
    h: Tensor,
    images: Tensor,
    texts: Tensor,
    owners: Tensor,
    shortlist: Shortlist | None = None,
    progress: str | None = None,
) -> RetrievalShare:
    """Score this process's images against every caption.

    Args:
        h: mixture tokens [N, K, D] of this process's images, on any device.
        images: their indices in the dataset [N], ascending.
        texts: features of all captions [T, D], on the device.
        owners: index of the image that each caption belongs to [T].
        shortlist: score its candidates alone; None: every pair.
        progress: title of a progress bar; None shows none.
    """
    images, owners = images.to(scorer.device), owners.to(scorer.device)
    first_hits = []
    best_scores = torch.empty(len(owners), 0, device=scorer.device)
    best_images = torch.empty(len(owners), 0, dtype=torch.int64, device=scorer.device)
    with tqdm(total=len(images), desc=progress, unit="img", disable=progress is None, leave=False) as bar:
        for start in range(0, len(images), BLOCK):
            block, tokens = images[start : start + BLOCK], h[start : start + BLOCK].to(scorer.device)
            if shortlist is None:
                scores = scorer.scores(tokens, texts)  # [B, T]
            else:
                scores = candidate_scores(scorer, tokens, texts, shortlist.candidates(block))
            order = scores.sort(dim=1, descending=True, stable=True).indices[:, :DEPTH]  # [B, <= DEPTH]
            first_hits.append(first_hit(owners[order] == block[:, None]))
            best_scores, best_images = best_of(
                torch.cat([best_scores, scores.T], dim=1),
                torch.cat([best_images, block.expand(len(owners), -1)], dim=1),
            )
            bar.update(len(block))
    hits = torch.cat(first_hits).cpu() if first_hits else torch.empty(0, dtype=torch.int64)
    return RetrievalShare(images.cpu(), hits, best_scores.cpu(), best_images.cpu())


def best_of(scores: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Keep each caption's `DEPTH` best of [T, n] scored images, best first; equal scores rank by image index."""
    by_index = images.argsort(dim=1, stable=True)
    scores, images = scores.gather(1, by_index), images.gather(1, by_index)
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :DEPTH]
    return scores.gather(1, order), images.gather(1, order)


def first_hit(hits: Tensor) -> Tensor:
    """Return the position of the first True of each row of [n, <= DEPTH], `DEPTH` for a row without one."""
    return torch.where(hits.any(dim=1), hits.int().argmax(dim=1), DEPTH)


@dataclass(frozen=True)
class Ranks:
    """Where the right answers came, `DEPTH` when further down, in the order of the dataset.

    Attributes:
        images: indices of the images, ascending [N]. image_to_text: place of each one's best own caption [N].
        text_to_image: place of each caption's image [T].
    """

    images: Tensor
    image_to_text: Tensor
    text_to_image: Tensor


def join(shares: list[RetrievalShare], owners: Tensor) -> Ranks:
    """Join the shares of all processes; `owners` as in `score_share`."""
    images = torch.cat([share.images for share in shares])
    order = images.argsort()
    first_hits = torch.cat([share.first_hits for share in shares])[order]
    found = [torch.cat([getattr(share, name) for share in shares], dim=1) for name in ("best_scores", "best_images")]
    _, best_images = best_of(*found)
    return Ranks(images[order], first_hits, first_hit(best_images == owners[:, None]))


def recalls(ranks: Ranks) -> dict[str, float]:
    """Return R@1, R@5 and R@10 in both directions, as fractions."""
    values = {f"image_to_text_R@{k}": recall_at(ranks.image_to_text, k) for k in RECALLS}
    return values | {f"text_to_image_R@{k}": recall_at(ranks.text_to_image, k) for k in RECALLS}
