"""A run with an evaluation of six pictures, for the tests of evaluation during training."""

import json
from pathlib import Path

from llip.configs import Config
from tests.helpers import image_bytes, tiny_model_file


def evaluated_run(folder: Path) -> Config:
    """Return a run of a tiny model that evaluates by `here.yaml`; `missing.yaml` beside it names pictures not there."""
    for index in range(6):
        target = folder / "pictures" / ("dog", "cat", "bird")[index % 3] / f"{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(image_bytes(index))
    common = {"type": "imagefolder", "metric": "top1", "prompts": ["a {c}"], "classnames": "dataset"}
    entries = {"here": common | {"path": "pictures"}, "missing": common | {"path": "nowhere"}}
    (folder / "catalog.json").write_text(json.dumps(entries))
    for name in entries:
        yaml = f"catalog_name: {folder}/catalog.json\nworkers: 0\ntasks: [{name}]\n"
        (folder / f"{name}.yaml").write_text(yaml)
    (folder / "logs" / "run").mkdir(parents=True)
    return Config(
        name="run", logs=str(folder / "logs"), model=tiny_model_file(folder), mixture_tokens=2, pool_heads=2,
        precision="fp32", device="cpu", eval_steps=5, evals=(str(folder / "here.yaml"),), report_to=(),
    )  # fmt: skip


def recorded(config: Config) -> list[dict]:
    """Return the lines of the run's evals.jsonl."""
    path = config.folder / "evals.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
