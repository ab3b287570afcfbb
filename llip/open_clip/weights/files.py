"""Files of weights: looked up by name, read without executing anything."""

import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import open_clip
import safetensors
import torch
from huggingface_hub import constants as hub
from huggingface_hub.utils import get_session

from llip.errors import UserError

LIBRARY = "llip"
"""What exported files name as their library."""

_HUB_SECONDS = 5

_IN_FOLDER = (  # the first that is there; ours, then OpenCLIP's and the hub's
    "model.safetensors",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)


class PixelStatistics(NamedTuple):
    """Mean and deviation per channel [3] of the normalisation that weights were trained with."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class WeightSource(NamedTuple):
    """Where weights to start from are, and what is known of them beside the tensors."""

    path: Path
    pixels: PixelStatistics | None  # None: unknown


def _statistics(described: dict[str, Any]) -> PixelStatistics | None:
    if described.get("mean") is None or described.get("std") is None:
        return None
    return PixelStatistics(tuple(map(float, described["mean"])), tuple(map(float, described["std"])))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a json object.

    Raises:
        UserError: the file cannot be read, or holds something else; `what` names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{what} {str(path)!r} cannot be read as json: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} {str(path)!r}: expected an object, found {type(content).__name__}")
    return content


def _folder_statistics(folder: Path) -> PixelStatistics | None:
    """Return what an `open_clip_config.json` beside the weights says."""
    path = folder / "open_clip_config.json"
    return _statistics(read_json(path, "config").get("preprocess_cfg", {})) if path.is_file() else None


def _agreed_statistics(model_name: str) -> PixelStatistics | None:
    """Return what all of OpenCLIP's tags for a model say, None where there are none or they differ."""
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    said = {_statistics(open_clip.get_pretrained_cfg(model_name, tag)) for tag in tags}
    return said.pop() if len(said) == 1 else None


def weights_in_folder(folder: Path) -> Path:
    """Return the file of weights in `folder`.

    Raises:
        UserError: there is none under a name that this project, OpenCLIP or the hub uses.
    """
    for name in _IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"folder {str(folder)!r} holds no weights; expected one of {', '.join(_IN_FOLDER)}")


def _download(described: dict[str, Any]) -> Path:
    """Return the file of an OpenCLIP tag from the hub or its cache. The hub's client retries for up to a minute where
    there is no network; one short request finds that out first, and then only the cache is asked.
    """
    offline = False
    try:
        get_session().head(hub.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception:  # whatever the client raises
        offline = True
    with patch.object(hub, "HF_HUB_OFFLINE", offline):
        return Path(open_clip.download_pretrained(described))


def find_weights(pretrained: str, model_name: str) -> WeightSource:
    """Return the weights that `pretrained` names.

    Args:
        pretrained: a file, a folder as OpenCLIP and the Hugging Face hub lay them out, or an OpenCLIP tag for
            `model_name` (downloaded if it can be).

    Raises:
        UserError: none of these, or the download failed.
    """
    path = Path(pretrained)
    if path.is_dir():
        return WeightSource(weights_in_folder(path), _folder_statistics(path) or _agreed_statistics(model_name))
    if path.is_file():
        # Our checkpoints carry their statistics; only OpenCLIP's own files have a config beside them.
        beside = path.parent if path.name.startswith("open_clip") else None
        described = _folder_statistics(beside) if beside else None
        return WeightSource(path, described or _agreed_statistics(model_name))
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if pretrained not in tags:
        known = f"OpenCLIP's tags for {model_name}: {', '.join(tags)}" if tags else f"{model_name} has no OpenCLIP tags"
        raise UserError(f"pretrained = {pretrained!r} is neither a file nor a tag, nor a folder; {known}")
    described = open_clip.get_pretrained_cfg(model_name, pretrained)
    try:
        return WeightSource(_download(described), _statistics(described))
    except Exception as error:  # any network or hub failure: the user needs the fix, not the stack
        raise UserError(
            f"the weights of tag {pretrained!r} could not be downloaded ({type(error).__name__}: {error}); "
            "fetch the file elsewhere and give its path"
        ) from error


def is_ours(checkpoint: dict[str, Any]) -> bool:
    """Return whether this project wrote the checkpoint: then it describes itself, and nothing is assumed."""
    return "model" in checkpoint or checkpoint.get("metadata", {}).get("library_name") == LIBRARY


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of plain tensors and containers (`weights_only`: nothing in it is ever executed).

    Raises:
        UserError: the file is not there, is damaged, or holds anything but tensors and plain containers.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} is not there")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
                return {"state_dict": state, "metadata": file.metadata() or {}}
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split(". ")[0]
        raise UserError(f"checkpoint {str(path)!r} is refused: not only tensors and containers ({reason})") from error
    except Exception as error:
        if "TorchScript" in str(error):
            raise UserError(
                f"checkpoint {str(path)!r} is a TorchScript archive, which holds code; give the same weights as "
                "safetensors or as a state dict"
            ) from error
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UserError(f"checkpoint {str(path)!r} is damaged or not a checkpoint ({reason})") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"checkpoint {str(path)!r} holds a {type(checkpoint).__name__}, expected a dict")
    return checkpoint
