"""The Triton kernels in Triton's interpreter, against dense float64 arithmetic written from the method's equations."""

import functools
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton comes with PyPI's CUDA build of torch")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from llip.main import train
from llip.open_clip.kernels import blocks, select
from llip.open_clip.pooling import TextConditionedPooling, unit_norm
from llip.open_clip.scores import plan
from llip.open_clip.scores.similarity import pairwise_scores
from llip.training.checkpoints.records import read_records
from tests.helpers import tiny_run


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Have the kernels chosen wherever their form is, without a comparison for each shape."""
    monkeypatch.setattr(select, "_request", "triton")
    monkeypatch.setattr(select, "_compare", lambda *_: (True, "not compared"))
    from llip.open_clip.kernels import launch

    assert launch._INTERPRETED, "triton was imported before TRITON_INTERPRET was set"
    return launch


class Shape(NamedTuple):
    heads: int
    images: int
    tokens: int
    size: int
    texts: int
    value_size: int | None = None


class Case(NamedTuple):
    """Keys and values [M, B, K, d], texts [T, D], W_Q [D, D], W_O [D, M e], and a gradient of the scores."""

    keys: torch.Tensor
    values: torch.Tensor
    texts: torch.Tensor
    query: torch.Tensor
    out: torch.Tensor
    upstream: torch.Tensor

    @property
    def leaves(self):
        return self[:5]


def make(shape, dtype, alike=0.0):
    """Return a case; with `alike`, the values of an image have so much in common, as at the start of training."""
    torch.manual_seed(0)
    heads, images, tokens, size, texts, value_size = shape
    width, value_size = heads * size, value_size or size
    keys = torch.randn(heads, images, tokens, size)
    values = torch.randn(heads, images, tokens, value_size) + alike * torch.randn(heads, images, 1, value_size)
    query = torch.eye(width) + 0.5 * width**-0.5 * torch.randn(width, width)
    out = torch.eye(width, heads * value_size) + 0.5 * width**-0.5 * torch.randn(width, heads * value_size)
    leaves = keys.to(dtype), values.to(dtype), unit_norm(torch.randn(texts, width)), query, out
    return Case(*(x.requires_grad_() for x in leaves), torch.randn(images, texts))


def gain(case):
    return case.texts.shape[1] ** 0.5 / 3


def results(case, **options):
    """Return scores and the gradients of all inputs."""
    scores = pairwise_scores(*case.leaves, gain(case), **options)
    return [scores.detach(), *torch.autograd.grad(scores, case.leaves, case.upstream)]


def exact_results(case):
    """Scores and gradients by the equations in docs/method.md, one head and all pairs at a time, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in case.leaves]
    keys, values, texts, query, out = leaves
    queries = (gain(case) * texts @ query.T).chunk(len(keys), dim=1)
    mixed = []
    for head, by_text in enumerate(queries):
        weights = torch.einsum("td,bkd->btk", by_text, keys[head]).softmax(dim=2)
        mixed.append(torch.einsum("btk,bke->bte", weights, values[head]))
    z = torch.cat(mixed, dim=2) @ out.T
    scores = torch.einsum("btd,td->bt", z, texts) / z.norm(dim=2)
    return [scores.detach(), *torch.autograd.grad(scores, leaves, case.upstream.double())]


def errors(computed, exact):
    """Return the norm of each error, relative to what it is an error of (to the largest, where that is zero)."""
    largest = max(x.norm().item() for x in exact[1:])
    return [
        ((x.double() - y).norm() / max(y.norm().item(), 1e-3 * largest)).item()
        for x, y in zip(computed, exact, strict=True)
    ]


BOUNDS = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2.5e-2}
"""A few roundings of float32; of float16 and bfloat16 as many as a product of theirs has."""


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 3, 5, 32, 37),  # everything odd
        Shape(2, 3, 5, 20, 37, 28),  # more numbers in a value than in a key, no power of two divides them
        Shape(1, 1, 40, 160, 20),
        Shape(3, 2, 32, 64, 70),
    ],
    ids=str,
)
def test_scores_and_all_gradients_are_those_of_float64(shape, dtype):
    case = make(shape, dtype)
    assert max(errors(results(case, form="image_gram"), exact_results(case))) < BOUNDS[dtype]


def test_one_token_and_more_images_than_take_turns():
    case = make(Shape(1, 17, 1, 16, 3), torch.float32)
    assert max(errors(results(case, form="image_gram"), exact_results(case))) < BOUNDS[torch.float32]


def test_more_rows_than_one_operand_takes():
    case = make(Shape(4, 1, 80, 16, 5), torch.bfloat16)
    assert blocks.choose_blocks(blocks.HeadShape(4, 80, 16, 16, 2), hopper=True).part < 4 * 80
    assert max(errors(results(case, form="image_gram"), exact_results(case))) < BOUNDS[torch.bfloat16]


def test_a_small_budget_takes_blocks_of_images_and_several_tiles():
    case = make(Shape(2, 3, 4, 16, 150), torch.float32)
    exact = exact_results(case)
    found = plan.plan_scores(
        3, 150, 4, 2, 32, training=True, on_cpu=True, budget=0, form="image_gram", kernel=plan.Kernel("triton", "")
    )
    assert (found.block_images, found.tile_texts) == (1, 128)
    assert max(errors(results(case, form="image_gram", memory_budget=0), exact)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alike", [0.0, 4.0])
def test_low_precision_is_as_exact_as_in_eager(monkeypatch, dtype, alike):
    """With values much alike, the slopes of norm and softmax are differences of large numbers."""
    case = make(Shape(2, 4, 16, 32, 64), dtype, alike)
    exact = exact_results(case)
    by_kernel = errors(results(case, form="image_gram"), exact)
    monkeypatch.setattr(select, "_request", "eager")
    by_eager = errors(results(case, form="image_gram"), exact)
    assert by_kernel[0] < 1.1 * by_eager[0]
    assert max(by_kernel[1:]) < 1.1 * max(by_eager[1:])


def test_counts_of_one_compile_as_others_do(interpreter):
    """Triton makes a constant of an argument that is 1, and a constant has no `to`."""
    for kernel in (interpreter.scores_kernel, interpreter.slopes_kernel):
        counts = {"images", "texts", "row_length"}
        assert counts <= set(kernel.arg_names)
        assert counts <= set(kernel.kwargs["do_not_specialize"])


def test_two_runs_have_equal_bits():
    case = make(Shape(2, 3, 8, 16, 50), torch.bfloat16)
    first, second = (results(case, form="image_gram") for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_floor_under_the_norm_has_no_slope():
    """Values of zero: scores and gradients are zero, not NaN."""
    case = make(Shape(2, 2, 4, 16, 9), torch.float32)
    case.values.data.zero_()
    scores, of_keys, *_ = results(case, form="image_gram")
    assert not scores.any()
    assert not of_keys.any()
    assert all(x.isfinite().all() for x in results(case, form="image_gram"))


def test_evaluation_and_autocast_through_a_pooling(monkeypatch):
    monkeypatch.setattr(plan, "_MOST_OF_FEATURES", 0)  # kernels for few pairs too
    torch.manual_seed(0)
    pooling = TextConditionedPooling(32, 2, 3.0)
    h, t = torch.randn(3, 5, 32), unit_norm(torch.randn(11, 32))
    exact = torch.einsum("btd,td->bt", pooling.double().contextualize(h.double(), t.double()), t.double())
    pooling.float()
    with torch.no_grad():
        torch.testing.assert_close(pooling.scores(h, t).double(), exact, atol=1e-6, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(pooling.scores(h, t).double(), exact, atol=1e-2, rtol=0)


def test_under_torch_compile():
    case = make(Shape(2, 2, 4, 16, 9), torch.float32)

    @functools.partial(torch.compile, backend="eager")
    def twice(*leaves):
        return 2 * pairwise_scores(*leaves, gain(case), form="image_gram")

    gradients = torch.autograd.grad(twice(*case.leaves), case.leaves, case.upstream)
    for gradient, expected in zip(gradients, exact_results(case)[1:], strict=True):
        torch.testing.assert_close(gradient.double(), 2 * expected, atol=1e-5, rtol=1e-4)


class Allocations(TorchDispatchMode):
    """Records dtype and numbers of every new tensor."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and not function.is_view:
            self.made.append((output.dtype, output.numel()))
        return output


def test_what_is_allocated(interpreter, monkeypatch):
    """No array of pairs has M K numbers of float32 each; four have them in bfloat16, in the backward pass."""
    shape = Shape(2, 8, 16, 16, 512)
    heads, images, tokens, _, texts, _ = shape
    case = make(shape, torch.bfloat16)
    launched = []
    for name in ("scores_kernel", "slopes_kernel"):  # their arguments count, not what the interpreter does with them
        monkeypatch.setattr(interpreter, name, FakeKernel(launched))
    monkeypatch.setattr(interpreter, "_product", lambda left, right: (left @ right).float())  # as on a GPU
    with torch.autograd.set_multithreading_enabled(False), Allocations() as allocations:
        results(case, form="image_gram")
    assert len(launched) == 2
    per_pair = [(dtype, numbers / (images * texts)) for dtype, numbers in allocations.made]
    assert [dtype for dtype, numbers in per_pair if numbers >= heads * tokens] == 4 * [torch.bfloat16]


class FakeKernel:
    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launched.append(grid)


@pytest.mark.slow
def test_a_run_trains_as_in_eager(tmp_path, monkeypatch):
    """With accumulation: the scores are those of cached features."""
    monkeypatch.setattr(plan, "_MOST_OF_FEATURES", 0)
    run = tiny_run(tmp_path, batch_size=2, accum_freq=2, train_num_samples=8, epochs=1, score_kernel="triton")
    train(run, "cpu")
    train(run.replace(name="eager", score_kernel="eager"), "cpu")
    first, second = (
        [record["loss"] for record in read_records(tmp_path / name / "metrics.jsonl")] for name in ("run", "eager")
    )
    assert len(first) == 2
    assert first == pytest.approx(second, rel=1e-5)
    assert "score_kernel triton" in (tmp_path / "run" / "log.txt").read_text()
