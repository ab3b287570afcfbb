"""Retrieval: exact scores against the dense form, memory, and shortlists. `python -m benchmarks.retrieval [--json]`

Shapes: B images, T captions, K = 32 mixture tokens, D = 512, M = 8 heads.

Features are random, with a planted truth where recall is reported: an image's tokens share a weak direction, and a
caption is the value of one token with noise. So recalls say what a shortlist loses on features of that kind, not how
good a model is. Memory is that of a fresh process: `VmHWM` of /proc/self/status, less the mixture tokens and
text features.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.similarity import HEADS, TEMPERATURE, Inputs, best_dense, dense
from llip.clipeval.retrieval import RetrievalShare, join, recalls, score_share
from llip.clipeval.scorer import Scorer
from llip.clipeval.shortlist import Shortlist, text_free_features
from llip.open_clip.pooling import create_pooling, unit_norm

TOKENS, WIDTH = 32, 512
SPEED_SHAPE = (500, 25_010)  # B, T
COCO = (5_000, 25_010)
RECALL_SHAPE = (1_000, 5_000)
DENSE_TILE = (16, 1024)  # images and captions of one dense call: all pairs at once would take 100 GB
SHARED = 0.3  # length of what an image's tokens share, next to 1 of their own
NOISE = 3.0  # length of a caption's noise; that of its token's value is 1
MEMORY_LIMIT = 2_000_000_000
MEMORY_SCORED = 600  # images scored when memory is measured: the third block of 256 reaches no further than the second
CLOSE = 1e-5  # largest difference between scores of two exact forms


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

    def contextualize(self, h: Tensor, t: Tensor) -> Tensor:
        return self.pooling.contextualize(h, t)


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


def seconds(run: Callable[[], object], device: torch.device) -> tuple[float, object]:
    """Time one call; return the time and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def exact(scorer: Scorer, data: Data) -> RetrievalShare:
    """Score every pair as an evaluation does."""
    return score_share(scorer, data.h, torch.arange(len(data.h)), data.texts, data.owners)


def by_shortlist(scorer: Scorer, data: Data, length: int) -> RetrievalShare:
    """Score the candidates of a shortlist as an evaluation does."""
    images = torch.arange(len(data.h), device=scorer.device)
    shortlist = Shortlist.of(text_free_features(scorer, data.h), images, data.texts, length)
    return score_share(scorer, data.h, images, data.texts, data.owners, shortlist)


def dense_pass(form: Callable[[Inputs], Tensor], scorer: Scorer, h: Tensor, texts: Tensor) -> Tensor:
    """Return the scores [B, T] of a dense form, in tiles that fit in memory."""
    pooling, upstream = scorer.model.pooling, torch.empty(0)
    rows = []
    for images in h.split(DENSE_TILE[0]):
        tokens = images.to(scorer.device)
        tiles = [form(Inputs(pooling, tokens, part, upstream)) for part in texts.split(DENSE_TILE[1])]
        rows.append(torch.cat(tiles, dim=1))
    return torch.cat(rows)


def measure_speed(scorer: Scorer, dense_images: int) -> dict:
    """Exact retrieval of 500 x 25,010 against two dense forms of which `dense_images` images are timed, in turns."""
    images, captions = SPEED_SHAPE
    data, device = make_data(scorer, images, captions), scorer.device
    forms = {"dense": dense, "best_dense": best_dense}
    spent = dict.fromkeys(forms, 0.0)
    for form in (*forms.values(), lambda inputs: scorer.scores(inputs.h, inputs.t)):  # warm-up
        dense_pass(form, scorer, data.h[: DENSE_TILE[0]], data.texts[: DENSE_TILE[1]])
    exact_seconds, worst = 0.0, 0.0
    half = dense_images // 2
    for turn, rows in enumerate((slice(0, half), slice(half, dense_images))):
        for name, form in forms.items():
            took, scores = seconds(
                lambda form=form, rows=rows: dense_pass(form, scorer, data.h[rows], data.texts), device
            )
            spent[name] += took
            ours = scorer.scores(data.h[rows][:16].to(device), data.texts)
            worst = max(worst, (ours - scores[:16]).abs().max().item())
        if turn == 0:
            exact_seconds, _ = seconds(lambda: exact(scorer, data), device)
    assert worst < CLOSE, f"exact scores differ from the dense form by {worst}"
    rates = {name: dense_images * captions / took for name, took in spent.items()}
    ours = images * captions / exact_seconds
    return {
        "shape": SPEED_SHAPE, "dense_images": dense_images, "exact_seconds": exact_seconds,
        "dense_seconds": {name: images * captions / rate for name, rate in rates.items()},
        "exact_pairs_per_second": ours, "dense_pairs_per_second": rates,
        "ratio": {name: ours / rate for name, rate in rates.items()}, "max_error": worst,
    }  # fmt: skip


def measure_shortlists(scorer: Scorer, lengths: list[int]) -> dict:
    """Recalls and seconds of shortlists against exact retrieval of 1,000 x 5,000."""
    data = make_data(scorer, *RECALL_SHAPE)
    exact_seconds, share = seconds(lambda: exact(scorer, data), scorer.device)
    truth = recalls(join([share], data.owners))
    rows = []
    for length in lengths:
        took, share = seconds(lambda length=length: by_shortlist(scorer, data, length), scorer.device)
        found = recalls(join([share], data.owners))
        loss = {name: truth[name] - value for name, value in found.items()}
        rows.append({"length": length, "seconds": took, "speedup": exact_seconds / took, "recall_loss": loss})
    return {"shape": RECALL_SHAPE, "exact_seconds": exact_seconds, "exact_recalls": truth, "shortlists": rows}


def measure_coco(scorer: Scorer, length: int, exact_rate: float) -> dict:
    """Seconds of a shortlist at 5,000 x 25,010, against what exact retrieval takes at a measured rate."""
    data = make_data(scorer, *COCO)
    took, _ = seconds(lambda: by_shortlist(scorer, data, length), scorer.device)
    predicted = COCO[0] * COCO[1] / exact_rate
    return {"shape": COCO, "length": length, "seconds": took, "exact_seconds_predicted": predicted,
            "speedup_predicted": predicted / took}  # fmt: skip


def high_water() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def memory_of(scored: int, length: int) -> dict:
    """Hold all features of 5,000 x 25,010 and score the first images (`length` > 0: by shortlist), in this process."""
    scorer = make_scorer(torch.device("cpu"))
    images, captions = COCO
    torch.manual_seed(1)
    texts = torch.randn(captions, WIDTH)
    data = Data(
        torch.randn(images, TOKENS, WIDTH), texts.div_(texts.norm(dim=1, keepdim=True)),
        torch.arange(captions) * images // captions,
    )  # fmt: skip
    before = high_water()
    shortlist = None
    if length:
        shortlist = Shortlist.of(text_free_features(scorer, data.h), torch.arange(images), data.texts, length)
    share = score_share(scorer, data.h[:scored], torch.arange(scored), data.texts, data.owners, shortlist)
    assert len(share.first_hits) == scored, "images were left out"
    features = 4 * (data.h.numel() + data.texts.numel())
    peak = high_water()
    return {
        "shape": COCO, "images_scored": scored, "shortlist": length or None, "peak_bytes": peak,
        "features_bytes": features, "beyond_features_bytes": peak - features, "before_scoring_bytes": before,
        "limit_bytes": MEMORY_LIMIT, "bounded": peak - features < MEMORY_LIMIT,
    }  # fmt: skip


def measure_memory(options: argparse.Namespace, length: int) -> dict:
    """Run `memory_of` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.retrieval", "--memory-of", str(options.memory_images), str(length)]
    command += ["--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=7200, check=True)
    return json.loads(done.stdout)


def as_text(results: dict) -> str:
    """Return the results for people."""
    speed, recall, coco = results["speed"], results["recall"], results["coco"]
    lines = [
        f"exact, {speed['shape'][0]} x {speed['shape'][1]:,}: {speed['exact_seconds']:.1f} s, "
        f"{speed['exact_pairs_per_second']:,.0f} pairs/s"
    ]
    for name, ratio in speed["ratio"].items():
        lines.append(f"  {ratio:.2f} x {name} ({speed['dense_pairs_per_second'][name]:,.0f} pairs/s)")
    lines.append(f"  largest difference to the dense form: {speed['max_error']:.1e}")
    for row in results["memory"]:
        how = "exact" if row["shortlist"] is None else f"shortlist {row['shortlist']}"
        lines.append(
            f"memory beyond the features at {COCO[0]:,} x {COCO[1]:,}, {how}: "
            f"{row['beyond_features_bytes'] / 1e9:.2f} GB, interpreter included (limit {MEMORY_LIMIT / 1e9:.0f} GB)"
        )
    lines.append(
        f"shortlists, {recall['shape'][0]:,} x {recall['shape'][1]:,} (exact: {recall['exact_seconds']:.1f} s)"
    )
    lines.append("  " + ", ".join(f"{name} {100 * value:.1f}" for name, value in recall["exact_recalls"].items()))
    for row in recall["shortlists"]:
        loss = ", ".join(f"{100 * value:.1f}" for value in row["recall_loss"].values())
        lines.append(f"  n = {row['length']}: {row['speedup']:.1f} x faster, recall lost: {loss}")
    lines.append(
        f"shortlist {coco['length']} at {COCO[0]:,} x {COCO[1]:,}: {coco['seconds']:.1f} s, about "
        f"{coco['speedup_predicted']:.0f} x faster than exact ({coco['exact_seconds_predicted']:.0f} s predicted)"
    )
    return "\n".join(lines)


@torch.no_grad()
def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m benchmarks.retrieval")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shortlists", type=int, nargs="+", default=[16, 64, 256], metavar="N", help="lengths")
    parser.add_argument("--dense-images", type=int, default=64, metavar="N", help="of 500, timed in the dense forms")
    parser.add_argument(
        "--memory-images", type=int, default=MEMORY_SCORED, metavar="N", help="of 5,000, scored for the memory figure"
    )
    parser.add_argument("--json", action="store_true", help="exactly one line of JSON on standard output")
    parser.add_argument("--memory-of", nargs=2, type=int, metavar=("IMAGES", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU was found; leave it out, or give --device cpu")
    if not 2 <= options.dense_images <= SPEED_SHAPE[0] or not 1 <= options.memory_images <= COCO[0]:
        parser.error("--dense-images is 2 to 500 and --memory-images 1 to 5000")
    if min(options.shortlists) < 10:
        parser.error("--shortlists are at least 10 long: R@10 is measured")
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(memory_of(*options.memory_of)))
        return 0
    scorer = make_scorer(torch.device(options.device))
    results = {"device": options.device, "threads": options.threads}
    middle = sorted(options.shortlists)[len(options.shortlists) // 2]
    with tqdm(total=4, unit="part", file=sys.stderr) as progress:
        results["speed"] = measure_speed(scorer, options.dense_images)
        progress.update()
        results["recall"] = measure_shortlists(scorer, options.shortlists)
        progress.update()
        results["coco"] = measure_coco(scorer, middle, results["speed"]["exact_pairs_per_second"])
        progress.update()
        results["memory"] = [measure_memory(options, length) for length in (0, middle)]
        progress.update()
    print(json.dumps(results) if options.json else as_text(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
