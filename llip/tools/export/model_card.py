"""The model card: README.md of the exported folder, with the results of an evaluation."""

import json
from pathlib import Path
from typing import Any

from llip.clipeval.task_result import TaskResult, classification_mean
from llip.configs import ATTENTION_POOLINGS
from llip.errors import UserError
from llip.open_clip.weights.files import LIBRARY, read_json


def read_results(path: Path, checkpoint: Path) -> list[TaskResult]:
    """Read a `results.json` of `evals.main_mc`, or the one in a folder.

    Args:
        path: the file or its folder.
        checkpoint: exported; results of a file of another size are refused.

    Raises:
        UserError: no such file, not a results file, or results of another checkpoint.
    """
    path = path / "results.json" if path.is_dir() else path
    if not path.is_file():
        raise UserError(
            f"--results {str(path)!r} do not exist; expected a results.json of evals.main_mc, or its folder"
        )
    stored = read_json(path, "results")
    try:
        results = [TaskResult.from_json(name, task) for name, task in stored["tasks"].items()]
        size = stored["model"]["checkpoint"]["bytes"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--results {str(path)!r}: not a results.json of evals.main_mc ({error!r})") from error
    if checkpoint.is_file() and size != checkpoint.stat().st_size:
        named = stored["model"]["checkpoint"].get("path")
        raise UserError(f"--results {str(path)!r} are of another checkpoint: {named}, {size:,} bytes")
    return results


def _results_section(results: list[TaskResult]) -> list[str]:
    lines = ["## Zero-shot results", "", "| task | metric | % | images |", "|---|---|---:|---:|"]
    for result in results:
        if result.error:
            lines.append(f"| {result.task} | {result.metric} | failed | |")
        for name, value in result.values.items():
            lines.append(f"| {result.task} | {name} | {100 * value:.1f} | {result.n} |")
    mean = classification_mean(results)
    if mean is not None:
        lines.append(f"| mean | of classification tasks | {100 * mean:.1f} | |")
    return [*lines, ""]


def _model_section(described: dict[str, Any], parameters: int) -> list[str]:
    architecture = described["architecture"]
    vision = architecture["vision_cfg"]
    tower = vision.get("timm_model_name") or "ViT, {layers} blocks of width {width}, patches of {patch_size} px".format(
        **{"layers": 12, "width": 768, "patch_size": 16, **vision}
    )
    rows = {
        "image tower": tower,
        "image size": f"{vision['image_size']} px",
        "context length": f"{architecture['text_cfg']['context_length']} tokens",
        "embedding width": architecture["embed_dim"],
        "mixture tokens": described["mixture_tokens"],
        "pooling": described["pooling"],
        "objective": described["loss"],
        "parameters": f"{parameters:,}",
    }
    if described["pooling"] in ATTENTION_POOLINGS:
        rows["captions attend to"] = described.get("pair_tokens", "mixture")
        rows["heads of the pooling"] = described["pool_heads"]
    if described["pooling"] == "text":
        rows["softmax temperature"] = described["softmax_temperature"]
    return ["## Model", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]


_USE = """## Use

```python
import llip
from PIL import Image

model = llip.load_pretrained("DIR")  # this folder
images = model.preprocess_val(Image.open("picture.jpg"))[None]
h = model.encode_image(images)
t = model.encode_text(model.tokenizer(["a cat", "a dog"]))
print(model.similarity(h, t))
```
"""

_PLAIN = """Plain OpenCLIP loads this folder too, with identical features:

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIR")
```
"""


def model_card(
    name: str, described: dict[str, Any], parameters: int, results: list[TaskResult] | None, plain: str | None
) -> str:
    """Return README.md.

    Args:
        name: title of the card.
        described: the model's `.config`.
        parameters: how many it has.
        results: of an evaluation; None where there was none.
        plain: why plain OpenCLIP cannot load the folder; None where it can.
    """
    header = {"library_name": LIBRARY, "pipeline_tag": "zero-shot-image-classification", "tags": ["clip", LIBRARY]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items()), "---", "", f"# {name}", ""]
    lines += [
        "An image-text model trained with [Llip](https://arxiv.org/abs/2405.00740) (Lavoie et al., ICML 2024): "
        "the image's feature may depend on the caption it is compared with.",
        "",
    ]
    lines += _model_section(described, parameters)
    lines += _results_section(results) if results else ["No zero-shot results came with this export.", ""]
    lines += [_USE]
    lines += [_PLAIN] if plain is None else [f"Plain OpenCLIP cannot load it: {plain}.", ""]
    return "\n".join(lines).rstrip() + "\n"
