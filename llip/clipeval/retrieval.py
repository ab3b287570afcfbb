"""Retrieval between N images and T captions, several captions per image, from exact scores in blocks of images.

Shapes: B images of a block, N images of this process, T captions of all processes, D embedding width.
Only mixture tokens are kept; the N x T scores are computed one block at a time, so memory beyond the features does not
grow with N.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from llip.clipeval.catalog.catalog import Entry
from llip.clipeval.catalog.opening import open_source
from llip.clipeval.loading import Unreadable, describe_skipped
from llip.clipeval.metrics import RECALLS, recall_at
from llip.clipeval.outcomes import Outcomes, hash_samples
from llip.clipeval.scorer import Scorer
from llip.clipeval.shortlist import Shortlist, candidate_scores
from llip.clipeval.task_run import TaskRun
from llip.clipeval.texts.labels import hash_texts

DEPTH = max(RECALLS)
BLOCK = 256
"""Images scored at once: bounds the B x T scores. The model projects all texts again for each block."""


def retrieve(entry: Entry, run: TaskRun) -> dict[str, Any]:
    """Evaluate one retrieval task on every process and return the fields of its result.

    Raises:
        TaskError: it cannot be evaluated.
    """
    processes, scorer = run.processes, run.scorer
    tokens: list[Tensor] = []
    mine: list[int] = []
    captions: list[tuple[int, str]] = []  # with the index of the image
    unreadable: list[Unreadable] = []
    with run.fail_together():
        source = open_source(entry)
    with run.fail_together():
        for batch in run.batches(source, entry.name):
            unreadable += batch.unreadable
            if batch.indices:
                tokens.append(run.encode(batch, source))
                mine += batch.indices
                captions += [(i, text) for i, texts in zip(batch.indices, batch.targets, strict=True) for text in texts]
        features = scorer.encode_texts([text for _, text in captions]).cpu() if captions else None
    shares = processes.all_gather_object((captions, features, unreadable))
    with run.fail_together():
        skipped = describe_skipped([item for *_, items in shares for item in items], len(source))
    # captions in the order of their images, so that ties rank the same for any number of processes
    pairs = [pair for share, *_ in shares for pair in share]
    order = sorted(range(len(pairs)), key=lambda position: pairs[position][0])
    owners, strings = torch.tensor([pairs[i][0] for i in order]), [pairs[i][1] for i in order]
    texts = torch.cat([part for _, part, _ in shares if part is not None])[order].to(scorer.device)
    h, images = torch.cat(tokens) if tokens else torch.empty(0), torch.tensor(mine, dtype=torch.int64)  # [N, K, D], [N]
    shortlist = _shortlist(h, images, texts, len(source), run)
    with run.fail_together():
        share = score_share(scorer, h, images, texts, owners, shortlist, run.title(f"{entry.name}: scores"))
    ranks = join(processes.all_gather_object(share), owners)
    outcomes = _outcomes([source.name(index) for index in ranks.images.tolist()], ranks, owners, strings)
    return {
        "values": recalls(ranks),
        "n": len(ranks.images),
        "texts": len(owners),
        "shortlist": run.config.shortlist,
        "samples": outcomes.samples,
        "outcomes": outcomes,
        **skipped,
        "prompts_hash": hash_texts(strings),
    }


def _shortlist(h: Tensor, images: Tensor, texts: Tensor, count: int, run: TaskRun) -> Shortlist | None:
    """Gather the text-independent features of all `count` images and find the candidates; `h` [N, K, D]."""
    if run.config.shortlist is None:
        return None
    with run.fail_together():
        mine = run.scorer.text_free_features(h).cpu() if len(images) else torch.empty(0, texts.shape[1])
    parts = run.processes.all_gather_object((images, mine))
    everything = torch.zeros(count, texts.shape[1])
    for indices, part in parts:
        everything[indices] = part
    scored = torch.cat([indices for indices, _ in parts]).sort().values
    with run.fail_together():
        return Shortlist.of(everything.to(texts.device), scored.to(texts.device), texts, run.config.shortlist)


def _outcomes(names: list[str], ranks: "Ranks", owners: Tensor, captions: list[str]) -> Outcomes:
    positions = torch.searchsorted(ranks.images, owners)
    samples = hash_samples([*names, *captions], [*[None] * len(names), *positions.tolist()])
    return Outcomes(
        samples,
        ranks.image_to_text.to(torch.uint8).numpy(),
        text_ranks=ranks.text_to_image.to(torch.uint8).numpy(),
        owners=positions.to(torch.int32).numpy(),
    )


@dataclass(frozen=True)
class RetrievalShare:
    """Results of one process's images, on the CPU.

    Attributes:
        images: indices of the images in the dataset [N].
        first_hits: rank of the best of each image's captions among all captions [N], at most `DEPTH`.
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
        shortlist: score only its candidates; None: every pair.
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
    """Return the position of the first True in each row of [n, <= DEPTH], `DEPTH` for a row without any."""
    return torch.where(hits.any(dim=1), hits.int().argmax(dim=1), DEPTH)


@dataclass(frozen=True)
class Ranks:
    """Ranks of the right answers, at most `DEPTH`, in the order of the dataset.

    Attributes:
        images: indices of the images, ascending [N]. image_to_text: rank of the best of each image's captions [N].
        text_to_image: rank of each caption's image [T].
    """

    images: Tensor
    image_to_text: Tensor
    text_to_image: Tensor


def join(shares: list[RetrievalShare], owners: Tensor) -> Ranks:
    """Join the shares of all processes; `owners` as in `score_share`."""
    images = torch.cat([share.images for share in shares])
    order = images.argsort()
    first_hits = torch.cat([share.first_hits for share in shares])[order]
    scores = torch.cat([share.best_scores for share in shares], dim=1)
    _, best_images = best_of(scores, torch.cat([share.best_images for share in shares], dim=1))
    return Ranks(images[order], first_hits, first_hit(best_images == owners[:, None]))


def recalls(ranks: Ranks) -> dict[str, float]:
    """Return R@1, R@5 and R@10 in both directions, as fractions."""
    values = {f"image_to_text_R@{k}": recall_at(ranks.image_to_text, k) for k in RECALLS}
    return values | {f"text_to_image_R@{k}": recall_at(ranks.text_to_image, k) for k in RECALLS}
