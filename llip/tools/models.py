"""Open a model on a device, as explain, diagnose and search do."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from llip.errors import UserError

if TYPE_CHECKING:  # imports torch, which takes seconds: not for --help
    from llip.open_clip.model import Llip

MODEL_HELP = "a checkpoint, an exported folder or file, or an OpenCLIP model (a folder; a name with --pretrained)"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that go with the argument of `MODEL_HELP`."""
    parser.add_argument("--pretrained", metavar="TAG", help="weights of an OpenCLIP model: a tag, a file or a folder")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer's files, if they have moved")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N [%(default)s]")


def open_on_device(model: str, pretrained: str | None, tokenizer: str | None, device: str) -> Llip:
    """Open any model that `llip.open_model` opens, on a device.

    Raises:
        UserError: no such model, weights that are not finite, or no such device here.
    """
    import torch

    from llip.open_clip.factory import open_model

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if device not in devices and not (device == "cuda" and len(devices) > 1):
        raise UserError(f"--device {device}: this machine has {', '.join(devices)}")
    opened = open_model(model, pretrained, tokenizer=tokenizer).to(device)
    check_weights(opened)
    return opened


def check_weights(model: Llip) -> None:
    """Raise a `UserError` that names the first parameter with NaN or inf."""
    import torch

    from llip.clipeval.scorer import require_finite

    largest = torch.stack([parameter.detach().abs().max().float() for parameter in model.parameters()])
    require_finite(largest, model, "weights", str)
