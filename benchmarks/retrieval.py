"""Retrieval: speed of exact scores, memory, and shortlists. `python -m benchmarks.retrieval [--json]`

Shapes: B images, T captions, K = 32 mixture tokens, D = 512, M = 8 heads.

Features are random, with a planted truth where recall is reported: an image's tokens share a weak direction, and a
caption is the value of one token with noise. Recalls show what a shortlist loses on such features, not how good a model
is. Memory is the peak of a fresh process less the mixture tokens and text features.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.measure import benchmark_parser, in_fresh_process, peak_resident, seconds, set_up
from benchmarks.similarity import HEADS, TEMPERATURE
from llip.clipeval.retrieval import RetrievalShare, join, recalls, score_share
from llip.clipeval.scorer import Scorer
from llip.clipeval.shortlist import Shortlist
from llip.errors import UserError
from llip.open_clip.pooling import create_pooling, unit_norm
from llip.system.program import program

TOKENS, WIDTH = 32, 512
SPEED_SHAPE = (500, 25_010)  # B, T
COCO = (5_000, 25_010)
RECALL_SHAPE = (1_000, 5_000)
SHARED = 0.3  # length of what an image's tokens share, next to 1 of their own
NOISE = 3.0  # length of a caption's noise; that of its token's value is 1
MEMORY_LIMIT = 2_000_000_000
EXACT_IMAGES = 600  # of COCO, scored exactly: the third block of 256 takes no more memory than the second


class Data(NamedTuple):
    """Mixture tokens [B, K, D], unit-norm captions [T, D], and the image of each caption [T]."""

    h: Tensor
    texts: Tensor
    owners: Tensor


class Head(nn.Module):
    """The scoring half of a Llip model."""

    def __init__(self) -> None:
        super().__init__()
        self.pooling = create_pooling("text", TOKENS, WIDTH, HEADS, TEMPERATURE)
        for parameter in self.pooling.parameters():
            parameter.data += 0.5 * torch.randn_like(parameter) * WIDTH**-0.5

    def similarity(self, h: Tensor, t: Tensor) -> Tensor:
        return self.pooling.scores(h, t)


def make_scorer(device: torch.device) -> Scorer:
    """Return a seeded head, away from its start, as a scorer without towers."""
    torch.manual_seed(0)
    return Scorer(Head().to(device).eval(), lambda image: image, lambda texts: torch.empty(0), device)


def make_data(scorer: Scorer, images: int, captions: int) -> Data:
    """Return seeded features with a planted truth; captions are shared out evenly, image by image."""
    torch.manual_seed(1)
    h = torch.randn(images, TOKENS, WIDTH)
    for block in h.split(256):
        block += SHARED * torch.randn(len(block), 1, WIDTH)
    owners = torch.arange(captions) * images // captions
    pooling = scorer.model.pooling
    texts = []
    for part in owners.split(4096):
        token = h[part, torch.randint(TOKENS, (len(part),))].to(scorer.device)
        value = unit_norm(pooling.out_proj(pooling.v_proj(token)))
        texts.append(unit_norm(value + NOISE * WIDTH**-0.5 * torch.randn(value.shape).to(value.device)))
    return Data(h, torch.cat(texts), owners)


def exact(scorer: Scorer, data: Data) -> RetrievalShare:
    """Score every pair as an evaluation does."""
    return score_share(scorer, data.h, torch.arange(len(data.h)), data.texts, data.owners)


def by_shortlist(scorer: Scorer, data: Data, length: int) -> RetrievalShare:
    """Score the candidates of a shortlist as an evaluation does."""
    images = torch.arange(len(data.h), device=scorer.device)
    shortlist = Shortlist.of(scorer.text_free_features(data.h), images, data.texts, length)
    return score_share(scorer, data.h, images, data.texts, data.owners, shortlist)


def measure_speed(scorer: Scorer) -> dict[str, Any]:
    """Time exact retrieval of 500 x 25,010."""
    data = make_data(scorer, *SPEED_SHAPE)
    exact(scorer, Data(data.h[:16], data.texts, data.owners))  # warm-up
    took = seconds(lambda: exact(scorer, data), scorer.device)
    return {"shape": SPEED_SHAPE, "exact_seconds": took, "pairs_per_second": SPEED_SHAPE[0] * SPEED_SHAPE[1] / took}


def measure_shortlists(scorer: Scorer, lengths: list[int]) -> dict[str, Any]:
    """Recalls and seconds of shortlists against exact retrieval of 1,000 x 5,000."""
    data = make_data(scorer, *RECALL_SHAPE)

    def measured(run: Callable[[], RetrievalShare]) -> tuple[float, dict[str, float]]:
        shares: list[RetrievalShare] = []
        took = seconds(lambda: shares.append(run()), scorer.device)
        return took, recalls(join(shares, data.owners))

    exact_seconds, truth = measured(lambda: exact(scorer, data))
    rows = []
    for length in lengths:
        took, values = measured(lambda length=length: by_shortlist(scorer, data, length))
        loss = {name: truth[name] - value for name, value in values.items()}
        rows.append({"length": length, "seconds": took, "speedup": exact_seconds / took, "recall_loss": loss})
    return {"shape": RECALL_SHAPE, "exact_seconds": exact_seconds, "exact_recalls": truth, "shortlists": rows}


def measure_coco(length: int, images: int) -> dict[str, Any]:
    """Score the first `images` of 5,000 x 25,010, in this process: exactly, or by a shortlist of `length` > 0."""
    scorer = make_scorer(torch.device("cpu"))
    torch.manual_seed(1)
    owners = torch.arange(COCO[1]) * COCO[0] // COCO[1]
    data = Data(torch.randn(COCO[0], TOKENS, WIDTH), unit_norm(torch.randn(COCO[1], WIDTH)), owners)

    def score() -> None:
        shortlist = None
        if length:
            shortlist = Shortlist.of(scorer.text_free_features(data.h), torch.arange(COCO[0]), data.texts, length)
        share = score_share(scorer, data.h[:images], torch.arange(images), data.texts, data.owners, shortlist)
        assert len(share.first_hits) == images, "images are missing"

    took = seconds(score, scorer.device)
    beyond = peak_resident() - 4 * (data.h.numel() + data.texts.numel())
    return {"shape": COCO, "images_scored": images, "shortlist": length or None, "seconds": took,
            "seconds_of_all_predicted": took * COCO[0] / images, "beyond_features_bytes": beyond,
            "limit_bytes": MEMORY_LIMIT, "bounded": beyond < MEMORY_LIMIT}  # fmt: skip


def as_text(results: dict[str, Any]) -> str:
    """Return the results as text."""
    speed, recall = results["speed"], results["recall"]
    lines = [
        f"exact, {speed['shape'][0]} x {speed['shape'][1]:,}: {speed['exact_seconds']:.1f} s, "
        f"{speed['pairs_per_second']:,.0f} pairs/s",
        f"shortlists, {recall['shape'][0]:,} x {recall['shape'][1]:,} (exact: {recall['exact_seconds']:.1f} s)",
        "  " + ", ".join(f"{name} {100 * value:.1f}" for name, value in recall["exact_recalls"].items()),
    ]
    for row in recall["shortlists"]:
        loss = ", ".join(f"{100 * value:.1f}" for value in row["recall_loss"].values())
        lines.append(f"  n = {row['length']}: {row['speedup']:.1f} x faster, recall lost: {loss}")
    for row in results["coco"]:
        how = f"shortlist {row['shortlist']}" if row["shortlist"] else "exact"
        lines.append(
            f"{COCO[0]:,} x {COCO[1]:,}, {how}: {row['seconds_of_all_predicted']:.1f} s predicted from "
            f"{row['images_scored']:,} images; memory beyond the features {row['beyond_features_bytes'] / 1e9:.2f} GB, "
            f"interpreter included (limit {MEMORY_LIMIT / 1e9:.0f} GB)"
        )
    return "\n".join(lines)


@program
@torch.no_grad()
def main(arguments: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = benchmark_parser("retrieval", __doc__)
    parser.add_argument("--shortlists", type=int, nargs="+", default=[16, 64, 256], metavar="N", help="lengths")
    parser.add_argument(
        "--exact-images", type=int, default=EXACT_IMAGES, metavar="N", help="of 5,000, scored exactly for memory"
    )
    parser.add_argument("--coco", nargs=2, type=int, metavar=("LENGTH", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = set_up(options)
    if options.coco:
        print(json.dumps(measure_coco(*options.coco)))
        return
    if not 1 <= options.exact_images <= COCO[0]:
        raise UserError(f"--exact-images {options.exact_images}: expected 1 to {COCO[0]}")
    if min(options.shortlists) < 10:
        raise UserError(f"--shortlists {min(options.shortlists)}: expected 10 or more, because R@10 is measured")
    scorer, middle = make_scorer(device), sorted(options.shortlists)[len(options.shortlists) // 2]
    threads = ("--threads", options.threads)
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: measure_speed(scorer),
        "recall": lambda: measure_shortlists(scorer, options.shortlists),
        "coco": lambda: [
            in_fresh_process("benchmarks.retrieval", *threads, "--coco", length, images, timeout=7200)
            for length, images in ((0, options.exact_images), (middle, COCO[0]))
        ],
    }
    results = {name: run() for name, run in tqdm(parts.items(), unit="part", file=sys.stderr)}
    results |= {"device": options.device, "threads": options.threads}
    print(json.dumps(results) if options.json else as_text(results))


if __name__ == "__main__":
    sys.exit(main())
