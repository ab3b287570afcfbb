"""The two encoders and the scorer as standalone programs, checked: torch.export (.pt2) and ONNX.

Shapes: B images, T texts, K mixture tokens, D embedding width, C context length. B and T may vary.

The scorer forms every z (B x T x D numbers): pass it as many pairs as fit into memory.
"""

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from llip.errors import UserError
from llip.open_clip.model import Llip

TOLERANCE = 1e-4
"""Largest difference between a program's outputs and the model's, relative to the largest output."""

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class ImageEncoder(nn.Module):
    """Normalised images [B, 3, S, S] -> mixture tokens [B, K, D] (and patches)."""

    def __init__(self, model: Llip) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)


class TextEncoder(nn.Module):
    """Token ids [T, C] -> unit-norm text features [T, D]."""

    def __init__(self, model: Llip) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


class Scorer(nn.Module):
    """Mixture tokens [B, K, D] and unit-norm text features [T, D] -> cosines [B, T]."""

    def __init__(self, model: Llip) -> None:
        super().__init__()
        self.pooling = model.pooling

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        return torch.einsum("btd,td->bt", self.pooling.contextualize(h, t), t)


class Program(NamedTuple):
    """A module to export, with its inputs."""

    name: str
    module: nn.Module
    inputs: dict[str, tuple[int, ...]]  # shapes after the first, which varies
    output: str
    token_ids: int  # size of the vocabulary if the inputs are token ids, otherwise 0

    def examples(self, count: int, seed: int) -> tuple[Tensor, ...]:
        """Return seeded inputs with `count`, `count` + 1, ... rows."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(count + place, *shape) for place, shape in enumerate(self.inputs.values())]
        if self.token_ids:
            return tuple(torch.randint(1, self.token_ids, shape, generator=generator) for shape in shapes)
        return tuple(torch.randn(shape, generator=generator) for shape in shapes)

    def check(self, output: Tensor, inputs: tuple[Tensor, ...], what: str) -> float:
        """Return the largest difference of `output` to the module's, relative to its largest number.

        Raises:
            AssertionError: more than `TOLERANCE`.
        """
        with torch.no_grad():
            expected = self.module(*inputs)
        error = float((output - expected).abs().max() / expected.abs().max())
        assert error < TOLERANCE, f"{what} {self.name} differs from the model by {error:.1e} of its largest output"
        return error


def programs(model: Llip) -> list[Program]:
    """Return the image encoder, the text encoder and the scorer of a model in eval mode on the CPU."""
    architecture = model.config["architecture"]
    size, width = architecture["vision_cfg"]["image_size"], architecture["embed_dim"]
    length, vocabulary = architecture["text_cfg"]["context_length"], architecture["text_cfg"]["vocab_size"]
    features = {"h": (model.visual.output_tokens, width), "t": (width,)}
    return [
        Program("image_encoder", ImageEncoder(model).eval(), {"images": (3, size, size)}, "h", 0),
        Program("text_encoder", TextEncoder(model).eval(), {"tokens": (length,)}, "t", vocabulary),
        Program("scorer", Scorer(model).eval(), features, "scores", 0),
    ]


def _shapes(program: Program) -> dict[str, dict[int, Any]]:
    return {name: {0: Dim(f"{name}_rows", min=1, max=65536)} for name in program.inputs}


def write_torch_program(folder: Path, program: Program) -> float:
    """Write `<name>.pt2`, load it again, and return its largest relative error on other inputs of another size."""
    path = folder / f"{program.name}.pt2"
    exported = torch.export.export(
        program.module, program.examples(2, seed=0), dynamic_shapes=tuple(_shapes(program).values())
    )
    torch.export.save(exported, path)
    inputs = program.examples(5, seed=1)
    with torch.no_grad():
        output = torch.export.load(path).module()(*inputs)
    return program.check(output, inputs, "torch.export's")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress messages."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def require_onnx() -> None:
    """Raise a `UserError` that names the packages to install for ONNX export, if any is missing."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs packages that are not installed: pip install {' '.join(missing)}")


def write_onnx_program(folder: Path, program: Program) -> float:
    """Write `<name>.onnx`, run it with ONNX Runtime, and return its relative error on inputs of another size."""
    import onnxruntime

    path = folder / f"{program.name}.onnx"
    with _quiet():
        torch.onnx.export(
            program.module,
            program.examples(2, seed=0),
            path,
            input_names=list(program.inputs),
            output_names=[program.output],
            dynamic_shapes=tuple(_shapes(program).values()),
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = program.examples(5, seed=1)
    given = {name: tensor.numpy() for name, tensor in zip(program.inputs, inputs, strict=True)}
    return program.check(torch.from_numpy(session.run(None, given)[0]), inputs, "ONNX's")
