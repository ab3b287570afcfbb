"""The exported folder: weights as safetensors, config, preprocessing, tokenizer. `llip.load_pretrained(DIR)` opens it.

Laid out as the Hugging Face hub expects a model repository: `config.json`, `model.safetensors`,
`preprocessor_config.json`, `README.md`.
"""

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from open_clip.tokenizer import HFTokenizer
from safetensors.torch import save_file
from torch import Tensor

import llip
from llip.errors import UserError
from llip.extensions import FOLDER, copy_extensions, extension_files
from llip.open_clip.factory import ModelSpec
from llip.open_clip.model import Llip
from llip.open_clip.transforms import IMAGE_MEAN, IMAGE_STD
from llip.open_clip.weights.files import LIBRARY
from llip.system.files import write_json

_OPTIONAL = ("open_clip_config.json", "open_clip_model.safetensors", "*.pt2", "*.onnx", "*.onnx.data")
"""Files that some exports write."""


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a folder to write into, whose files move to `out` at the end, and not after an error.

    Files of an earlier export that this one does not write are removed: they belong to other weights.

    Raises:
        UserError: `out` holds other files than those of an export, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {str(out)!r} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not _is_export(out):
        raise UserError(f"--out {str(out)!r} holds other files than those of an export; give a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder:
            yield Path(folder)
            new = sorted(path.name for path in Path(folder).iterdir())
            shutil.rmtree(out / FOLDER, ignore_errors=True)  # a folder is not replaced by another one
            for name in new:
                os.replace(Path(folder) / name, out / name)
        for pattern in _OPTIONAL:
            for path in out.glob(pattern):
                if path.name not in new:
                    path.unlink()
    except OSError as error:
        raise UserError(f"--out {str(out)!r} cannot be written: {error}") from error


def _is_export(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("library_name") == LIBRARY
    except (OSError, ValueError, AttributeError):
        return False


def save_weights(path: Path, state: dict[str, Tensor], library: str) -> None:
    """Write tensors as safetensors, unshared and contiguous, with the name of the library that reads them."""
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    save_file(tensors, path, metadata={"format": "pt", "library_name": library})


def preprocessing(image_size: int, resize_mode: str) -> dict[str, Any]:
    """Return the evaluation transform as a config of the hub's CLIP image processor."""
    square = {"height": image_size, "width": image_size}
    squash = resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if squash else {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": not squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def write_model(folder: Path, model: Llip) -> None:
    """Write weights, config, preprocessing, and the files of a tokenizer that OpenCLIP does not ship."""
    described = copy.deepcopy(model.config)
    text = described["architecture"]["text_cfg"]
    if text.get("hf_tokenizer_name"):
        assert isinstance(model.tokenizer, HFTokenizer)
        model.tokenizer.save_pretrained(str(folder))
        text["hf_tokenizer_name"] = "."  # relative to this folder
    copy_extensions(extension_files(described).values(), folder / FOLDER)
    save_weights(folder / "model.safetensors", model.state_dict(), LIBRARY)
    write_json(
        folder / "config.json",
        {"library_name": LIBRARY, "llip_version": llip.__version__, "model_type": LIBRARY, "model": described},
    )
    spec = ModelSpec(**described)
    write_json(folder / "preprocessor_config.json", preprocessing(spec.image_size, spec.resize_mode))
