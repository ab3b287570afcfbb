"""Retrieval in blocks and by shortlist: hand-worked ranks, and the exact result where the shortlist holds all."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llip.clipeval import retrieval
from llip.clipeval.retrieval import join, recalls, score_share
from llip.clipeval.scorer import Scorer
from llip.clipeval.shortlist import Shortlist, candidate_scores
from llip.clipeval.task_result import TaskResult
from llip.errors import UserError
from llip.open_clip.pooling import create_pooling
from tests.clipeval import fakes
from tests.clipeval.fakes import (
    FakeModel,
    captions_of,
    picture,
    png,
    preprocess,
    tokenize,
    write_catalog,
    write_retrieval,
    write_tar,
)
from tests.helpers import ProcessPool


class TableModel(nn.Module):
    """Image i is h = [[i]], text j is t = [j]; their score stands in a table, and in another one without the text."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def similarity(self, h: Tensor, t: Tensor) -> Tensor:
        return self.table[h[:, 0, 0].long()][:, t[:, 0].long()]


def table_scorer(table: Tensor) -> tuple[Scorer, Tensor, Tensor]:
    scorer = Scorer(TableModel(table), preprocess, tokenize, torch.device("cpu"))
    images, texts = (torch.arange(float(count))[:, None] for count in table.shape)
    return scorer, images[:, None], texts


# 12 images; caption j belongs to image j, caption 12 to image 0 as well
OWNERS = torch.tensor([*range(12), 0])


def worked_table() -> Tensor:
    """Everything right but images 1, 2 and 3 and caption 12."""
    table = torch.zeros(12, 13)
    table[torch.arange(12), torch.arange(12)] = 0.9
    table[0, 12] = 0.8
    table[1, [2, 3, 4]] = 0.95  # three captions above its own: fourth
    table[2, [0, 1, 5, 6, 7, 8, 9, 10, 12]] = 0.99  # nine above its own: tenth
    table[3, [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 12]] = 0.92  # eleven above its own: twelfth
    table[4:10, 12] = 0.85  # with images 2 and 3, eight above its own: ninth
    return table


IMAGE_RANKS = [0, 3, 9, 10, 0, 0, 0, 0, 0, 0, 0, 0]  # 10: further down
TEXT_RANKS = [2, 2, 2, 1, 2, 2, 2, 2, 2, 2, 2, 0, 8]
EXPECTED = {
    "image_to_text_R@1": 9 / 12,
    "image_to_text_R@5": 10 / 12,
    "image_to_text_R@10": 11 / 12,
    "text_to_image_R@1": 1 / 13,
    "text_to_image_R@5": 12 / 13,
    "text_to_image_R@10": 13 / 13,
}


def shares(scorer: Scorer, h: Tensor, texts: Tensor, parts: list[Tensor], **options: object) -> dict[str, float]:
    found = [score_share(scorer, h[part], part, texts, OWNERS, **options) for part in parts]
    return recalls(join(found, OWNERS))


def test_hand_worked_recalls(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, h, texts = table_scorer(worked_table())
    everyone = torch.arange(12)
    assert shares(scorer, h, texts, [everyone]) == pytest.approx(EXPECTED)
    assert shares(scorer, h, texts, [everyone[0::3], everyone[1::3], everyone[2::3]]) == pytest.approx(EXPECTED)
    monkeypatch.setattr(retrieval, "BLOCK", 5)
    assert shares(scorer, h, texts, [everyone]) == pytest.approx(EXPECTED)
    assert shares(scorer, h, texts, [everyone[0::2], everyone[1::2]]) == pytest.approx(EXPECTED)


def test_ranks_are_in_the_order_of_the_dataset() -> None:
    scorer, h, texts = table_scorer(worked_table())
    odd, even = torch.arange(1, 12, 2), torch.arange(0, 12, 2)
    ranks = join([score_share(scorer, h[part], part, texts, OWNERS) for part in (odd, even)], OWNERS)
    assert ranks.images.tolist() == list(range(12))
    assert ranks.image_to_text.tolist() == IMAGE_RANKS
    assert ranks.text_to_image.tolist() == TEXT_RANKS


def test_a_shortlist_scores_its_candidates_and_nothing_else() -> None:
    torch.manual_seed(0)
    features, texts = F.normalize(torch.randn(30, 8), dim=1), F.normalize(torch.randn(70, 8), dim=1)
    images = torch.arange(0, 30, 2)  # the odd ones cannot be read
    shortlist = Shortlist.of(features, images, texts, 4)
    block = images[3:9]
    chosen = shortlist.candidates(block)
    coarse = features[images] @ texts.T
    for row, image in enumerate(block.tolist()):
        own = sorted(range(70), key=lambda j: -float(coarse[images.tolist().index(image), j]))[:4]
        for j in range(70):
            best = sorted(range(len(images)), key=lambda i: -float(coarse[i, j]))[:4]
            assert bool(chosen[row, j]) == (j in own or image in [int(images[i]) for i in best])
    model = FakeModel()
    scorer = Scorer(model, preprocess, tokenize, torch.device("cpu"))
    h, wide = torch.randn(6, 3, 16), F.normalize(torch.randn(70, 16), dim=1)
    few = chosen & (torch.rand(chosen.shape) < 0.5)
    for mask in (few, torch.ones_like(few)):  # one image at a time, and all pairs at once
        scores = candidate_scores(scorer, h, wide, mask)
        exact = model.similarity(h, wide)
        torch.testing.assert_close(scores[mask], exact[mask], atol=1e-6, rtol=1e-5)
        assert torch.isinf(scores[~mask]).all()


@pytest.mark.parametrize("kind", ["text", "mean"])
def test_the_text_independent_feature_weighs_all_tokens_alike(kind: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.pooling = create_pooling(kind, 4, 16, 2, 5.0)
    scorer = Scorer(model, preprocess, tokenize, torch.device("cpu"))
    h = torch.randn(100, 4, 16)
    with torch.no_grad():  # as initialised, W_V and W_O are the identity
        torch.testing.assert_close(scorer.text_free_features(h), F.normalize(h.mean(dim=1), dim=1))


def evaluate(folder: Path, **options: object) -> TaskResult:
    (result,) = fakes.evaluate(FakeModel(), folder / "catalog.json", **options)
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_retrieval(tmp_path / "pairs", 30)
    write_catalog(tmp_path / "catalog.json", {"pairs": {"type": "retrieval", "path": "pairs"}})
    return tmp_path


def _values(rank: int, count: int, folder: Path) -> list[dict[str, float]]:
    return [evaluate(folder, shortlist=length).values for length in (10, 30)]


def test_a_shortlist_of_all_is_exact_and_labelled(folder: Path, pool: ProcessPool) -> None:
    exact = evaluate(folder)
    assert (exact.shortlist, "shortlist" in exact.to_json()) == (None, False)
    everything = evaluate(folder, shortlist=60)
    assert everything.values == exact.values
    assert everything.to_json()["shortlist"] == 60
    assert evaluate(folder, shortlist=30).values == exact.values  # every image is a candidate of every caption
    few = evaluate(folder, shortlist=10)
    assert few.values != exact.values
    assert TaskResult.from_json("pairs", few.to_json()) == few
    assert pool.run(_values, 2, folder) == [[few.values, exact.values]] * 2


def test_too_short_a_list(folder: Path) -> None:
    with pytest.raises(UserError, match="shortlist = 9; expected an integer, 10 to "):
        evaluate(folder, shortlist=9)


def test_an_unreadable_image_is_no_candidate(tmp_path: Path) -> None:
    """The last shard cannot be decoded; what is left gives the result of a dataset without it."""
    members = {f"{i:05d}": captions_of(i) for i in range(24)}
    for name, count in (("whole", 16), ("broken", 24)):
        pictures = {f"{key}.png": png(picture(i)) if i < 16 else b"broken" for i, key in enumerate(members)}
        texts = {f"{key}.txt": "\n".join(captions) for key, captions in members.items()}
        kept = [f"{i:05d}" for i in range(count)]
        write_tar(tmp_path / name / "test/0.tar", {k: v for k, v in (pictures | texts).items() if k[:5] in kept})
    results = []
    for name in ("whole", "broken"):
        write_catalog(tmp_path / "catalog.json", {"pairs": {"type": "retrieval", "path": name, "caption_key": "txt"}})
        results.append(evaluate(tmp_path, shortlist=12))
    assert [result.skipped for result in results] == [0, 8]
    assert results[0].values == results[1].values
    assert results[0].samples == results[1].samples
