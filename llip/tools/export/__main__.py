"""Write a checkpoint as a folder for others: `llip export CHECKPOINT --out DIR`.

The folder holds safetensors, config and preprocessing, which `llip.load_pretrained(DIR)` opens, and a model card, laid
out as the Hugging Face hub expects. Where plain OpenCLIP can hold the model it holds that form too.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llip.system.program import program


def export(
    checkpoint: Path,
    out: Path,
    results: Path | None = None,
    *,
    torch_export: bool = False,
    onnx: bool = False,
    name: str | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Write `checkpoint` to the folder `out`; nothing appears there unless everything is written and checked.

    Args:
        checkpoint: a checkpoint of this project, or a folder of an earlier export.
        out: a new folder, or one that an export wrote.
        results: a `results.json` for the model card.
        torch_export, onnx: also write the two encoders and the scorer as programs.
        name: title of the model card; by default that of the run's folder.
        tokenizer: folder of the tokenizer's files, if they have moved.

    Returns:
        Files with their bytes, the largest differences that the checks measured, and why there is no form for plain
        OpenCLIP, if there is none.

    Raises:
        UserError: a checkpoint that cannot be read or whose weights are not finite, results of another one, a folder
            with other files, or missing packages.
    """
    from tqdm import tqdm

    from llip.open_clip.factory import load_pretrained
    from llip.tools.export import folder as layout
    from llip.tools.export import plain_openclip, programs
    from llip.tools.export.model_card import model_card, read_results
    from llip.tools.models import check_weights

    if onnx:
        programs.require_onnx()
    task_results = read_results(results, checkpoint) if results else None
    model = load_pretrained(checkpoint, tokenizer)
    check_weights(model)
    checks: dict[str, float] = {}
    with layout.staged(out) as folder:
        layout.write_model(folder, model)
        reason = plain_openclip.why_not(model)
        if reason is None:
            checks[plain_openclip.WEIGHTS] = plain_openclip.write_plain(folder, model)
        parameters = sum(p.numel() for p in model.parameters())
        title = name or _title(checkpoint)
        card = model_card(title, model.config, parameters, task_results, reason)
        (folder / "README.md").write_text(card, encoding="utf-8")
        writers = [(programs.write_torch_program, ".pt2")] * torch_export
        writers += [(programs.write_onnx_program, ".onnx")] * onnx
        jobs = [(write, suffix, program) for write, suffix in writers for program in programs.programs(model)]
        for write, suffix, program in tqdm(jobs, desc="programs", unit="program", disable=not jobs):
            checks[program.name + suffix] = write(folder, program)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {"out": str(out), "files": files, "checks": checks, "open_clip": reason is None, "why_not": reason}


def _title(checkpoint: Path) -> str:
    """Return `<name>` of `<logs>/<name>/checkpoints/<file>`, otherwise the file's name."""
    path = checkpoint.resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.stem


def as_table(outcome: dict[str, Any]) -> str:
    """Return what was written as text."""
    width = max(map(len, outcome["files"]))
    lines = []
    for name, size in outcome["files"].items():
        checked = f"   checked: differs by {outcome['checks'][name]:.0e}" if name in outcome["checks"] else ""
        lines.append(f"{name:{width}}  {size / 1e6:10.2f} MB{checked}")
    if outcome["why_not"]:
        lines.append(f"no form for plain OpenCLIP: {outcome['why_not']}")
    return "\n".join([*lines, f'llip.load_pretrained("{outcome["out"]}") opens it'])


@program
def main(argv: Sequence[str]) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="llip export", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint, or an exported folder")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new folder, or that of an export")
    parser.add_argument(
        "--results", metavar="FILE", type=Path, help="results.json of evals.main_mc, for the model card"
    )
    parser.add_argument("--torch-export", action="store_true", help="also write encoders and scorer as .pt2 programs")
    parser.add_argument("--onnx", action="store_true", help="also write encoders and scorer as ONNX programs")
    parser.add_argument("--name", help="title of the model card [the run's name]")
    parser.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer's files, if they have moved")
    parser.add_argument("--json", action="store_true", help="exactly one line of JSON on standard output")
    given = parser.parse_args(argv)
    outcome = export(
        given.checkpoint,
        given.out,
        given.results,
        torch_export=given.torch_export,
        onnx=given.onnx,
        name=given.name,
        tokenizer=given.tokenizer,
    )
    print(json.dumps(outcome) if given.json else as_table(outcome))


if __name__ == "__main__":
    sys.exit(main())
