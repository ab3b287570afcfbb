"""The text side of zero-shot classification: what images are scored against, and what makes a class's score of it.

Shapes: B images, C classes, P prompts of a class, Q queries, K mixture tokens, D embedding width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from llip.clipeval import scorer as scoring
from llip.clipeval.scorer import Scorer
from llip.clipeval.task_run import TaskRun
from llip.clipeval.texts.labels import Labels
from llip.errors import UserError

MAX_QUERIES = 2_000_000
"""Text features that `score` keeps at most, all classes together."""

SCORES_AT_ONCE = 1 << 26
"""Scores B x Q that are in memory at once."""


@dataclass(frozen=True)
class Classifier:
    """Text features, and which of them are of which class.

    Attributes:
        features: unit-norm, of all queries [Q, D].
        groups: (classes [n], numbers of their queries [n, P]) for the classes with P queries; a class's score is the
            mean over its queries.
    """

    features: Tensor
    groups: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, features: Tensor, of_class: Sequence[Sequence[int]]) -> "Classifier":
        """Take the features of all queries [Q, D], and the numbers of each class's queries [C]."""
        groups = []
        for count in sorted({len(queries) for queries in of_class}):
            classes = [label for label, queries in enumerate(of_class) if len(queries) == count]
            rows = [of_class[label] for label in classes]
            groups.append((torch.tensor(classes).to(features.device), torch.tensor(rows).to(features.device)))
        return cls(features, tuple(groups))

    def scores(self, scorer: Scorer, h: Tensor) -> Tensor:
        """Return the scores [B, C] of mixture tokens [B, K, D]."""
        return torch.cat([self._scores(scorer, part) for part in h.split(max(1, SCORES_AT_ONCE // len(self.features)))])

    def _scores(self, scorer: Scorer, h: Tensor) -> Tensor:
        of_query = scorer.scores(h, self.features)  # [B, Q]
        scores = of_query.new_empty(len(h), sum(len(classes) for classes, _ in self.groups))
        for classes, queries in self.groups:
            scores[:, classes] = of_query[:, queries].mean(dim=2)
        return scores


def queries_of(labels: Labels, ensemble: str) -> tuple[list[list[str]], list[list[int]]]:
    """Return the texts of each query, and the numbers of each class's queries.

    With ensemble `feature`, CLIP's protocol, a class's prompts are one query: the mean of their unit-norm features,
    re-normalised. With `score` each distinct prompt is one, though several classes may have it.

    Raises:
        UserError: more queries than can be kept.
    """
    prompts = [labels.prompts_of(label) for label in range(len(labels.classnames))]
    if ensemble == "feature":
        return prompts, [[label] for label in range(len(prompts))]
    distinct = dict.fromkeys(text for some in prompts for text in some)
    number = {text: query for query, text in enumerate(distinct)}
    if len(number) > MAX_QUERIES:
        raise UserError(
            f"prompt_ensemble = 'score' scores each image against {len(number):,} texts, at most {MAX_QUERIES:,}; use "
            "'feature'"
        )
    return [[text] for text in number], [[number[text] for text in some] for some in prompts]


def build_classifier(run: TaskRun, labels: Labels, task: str = "") -> Classifier:
    """Return the classifier of a task, on the device: from the cache, else each process encodes its share.

    Raises:
        TaskError: too many prompts, or features that are not finite.
    """
    processes, cache = run.processes, run.cache
    with run.fail_together():
        texts, of_class = queries_of(labels, run.config.prompt_ensemble)
    if cache is not None:
        with run.fail_together():
            path = cache.path(run.scorer, texts)
            cached = cache.load(path, len(texts))
        everywhere = all(processes.all_gather_object(cached is not None))  # a folder may differ by machine
        if everywhere and cached is not None:
            return Classifier.of(cached.to(run.scorer.device), of_class)
    with run.fail_together():
        mine = [texts[query] for query in processes.share(len(texts))]
        part = encode_queries(run.scorer, mine, run.title(f"{task}: class names")).cpu() if mine else None
    parts = processes.all_gather_object(part)
    features = torch.empty(len(texts), parts[0].shape[1])
    for rank, part in enumerate(parts):
        features[rank :: processes.world_size] = part if part is not None else 0
    if cache is not None and processes.is_main:
        cache.store(path, features)
    return Classifier.of(features.to(run.scorer.device), of_class)


def encode_queries(scorer: Scorer, texts: Sequence[list[str]], progress: str | None = None) -> Tensor:
    """Return the features [Q, D] of queries: the mean of the unit-norm features of each one's texts, re-normalised.

    Args:
        progress: title of a progress bar; None shows none.
    """
    parts = []
    with tqdm(total=sum(map(len, texts)), desc=progress, unit="text", disable=progress is None, leave=False) as bar:
        for block in _blocks(texts):
            flat = [text for some in block for text in some]
            features = scorer.encode_texts(flat).split([len(some) for some in block])
            parts.append(F.normalize(torch.stack([part.mean(dim=0) for part in features]), dim=-1))
            bar.update(len(flat))
    return torch.cat(parts)


def _blocks(texts: Sequence[list[str]]) -> Iterator[list[list[str]]]:
    """Yield as many queries as one text batch holds, at least one: the features of single prompts need not stay."""
    block: list[list[str]] = []
    for some in texts:
        if block and sum(map(len, block)) + len(some) > scoring.TEXT_BATCH:
            yield block
            block = []
        block.append(some)
    if block:
        yield block
