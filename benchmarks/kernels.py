"""Compile the score kernels without a GPU: `python -m benchmarks.kernels [CONFIG ...] [--arch 80 90] [--json]`

Shows the registers, spilled bytes, shared memory and tensor-core instructions of both kernels for the shape of each
config, by Triton's own ptxas and cuobjdump. Exit code 1 if a kernel spills or does not fit into a GPU.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llip.config_search import search_config
from llip.open_clip.costs.flops import score_shape
from llip.open_clip.kernels.blocks import HeadShape, choose_blocks
from llip.open_clip.model import autocast_dtype
from llip.system.program import program

CONFIGS = ["llip_b32_k64", "llip_b16_k32", "llip_l14_k32", "llip_h14_k64", "llip_G14_k64", "llip_quickstart"]
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
"""Compute capability -> bytes of shared memory that one block may have."""

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_FLOAT = ("gram_scale", "scores", "numerators", "squares", "upstream")
_INTEGERS = ("images", "texts", "row_length")


def compile_kernel(kernel: Any, constants: dict[str, Any], types: dict[str, str], arch: int, options: dict) -> Any:
    """Compile one kernel for one architecture, its pointers being multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict.fromkeys(constants, "constexpr") | {
        name: "i32" if name in _INTEGERS else f"*{types.get(name, types[''])}" for name in names
    }
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(kernel.arg_names) if signature[name][0] == "*"
    }
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={name: constants[name] for name in kernel.arg_names if name in constants},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Return what a compiled kernel takes."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run(
            [tool, "-res-usage", path], check=True, capture_output=True, text=True, timeout=60
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    ptx = compiled.asm["ptx"]
    return {
        "registers": registers,
        "spilled_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"mma\.sync", ptx)),
    }


def compile_shape(shape: HeadShape, dtype: torch.dtype, arch: int, precision: str = "tf32") -> list[dict[str, Any]]:
    """Compile both kernels for a shape; one row each."""
    from llip.open_clip.kernels.backward import slopes_kernel
    from llip.open_clip.kernels.forward import scores_kernel
    from llip.open_clip.kernels.launch import kernel_constants, norm_dtype

    blocks = choose_blocks(shape, hopper=arch >= 90)
    constants = kernel_constants(shape, blocks, dtype, precision)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    types = dict.fromkeys(_FLOAT, "fp32") | {"": _TYPES[dtype]}
    norm = dict.fromkeys(("gram", "scratch"), _TYPES[norm_dtype(dtype)])
    rows = []
    for name, kernel, own_constants, own_types in (
        ("forward", scores_kernel, {"BC": blocks.columns, "TRAINING": True}, norm),
        ("backward", slopes_kernel, {}, {}),
    ):
        compiled = compile_kernel(kernel, constants | own_constants, types | own_types, arch, options)
        rows.append({"kernel": name, "arch": arch, "texts": blocks.texts, **resources(compiled)})
    return rows


def fits(row: dict[str, Any]) -> bool:
    """Return whether a kernel runs at full speed: nothing spilled, shared memory within bounds, tensor cores used."""
    tensor_cores = row["wgmma"] if row["arch"] >= 90 else row["mma"]
    strict = row["precision"] == "ieee"  # float32 without TF32 has no tensor cores
    return not row["spilled_bytes"] and row["shared_bytes"] <= SHARED_MEMORY[row["arch"]] and (strict or tensor_cores)


def as_table(rows: list[dict[str, Any]]) -> str:
    """Return the rows for people."""
    lines = ["| config | K x M, d | type | kernel | sm | texts | registers | spilled | shared KB | wgmma | mma |"]
    lines.append("|" + "---|" * 11)
    for row in rows:
        cells = [row[name] for name in ("config", "shape", "type", "kernel", "arch", "texts", "registers")]
        cells += [row["spilled_bytes"], round(row["shared_bytes"] / 1024), row["wgmma"], row["mma"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


@program
def main(arguments: Sequence[str]) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", default=CONFIGS, metavar="CONFIG", help="[the published ones]")
    parser.add_argument("--arch", nargs="+", type=int, choices=SHARED_MEMORY, default=list(SHARED_MEMORY))
    parser.add_argument("--json", action="store_true", help="print one json document instead of a table")
    options = parser.parse_intermixed_args(arguments)
    rows = []
    for name in options.configs:
        config = search_config(name)
        shape, dtype = score_shape(config), autocast_dtype(config.precision) or torch.float32
        precision = "ieee" if config.precision == "fp32" else "tf32"
        about = {
            "config": name, "shape": f"{shape.tokens} x {shape.heads}, {shape.key_size}", "type": _TYPES[dtype],
            "precision": precision,
        }  # fmt: skip
        for arch in options.arch:
            rows += [about | row for row in compile_shape(shape, dtype, arch, precision)]
    print(json.dumps(rows) if options.json else as_table(rows))
    return 0 if all(map(fits, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
