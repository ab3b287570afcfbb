"""Peak FLOP/s, memory and its bandwidth of GPUs, from the vendors' data sheets; dense, without structured sparsity."""

import dataclasses

from llip.errors import UserError, did_you_mean

_TERA, _GIB = 10**12, 2**30


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of accelerator.

    Attributes:
        name: as `--gpu` takes it.
        memory: bytes.
        bandwidth: of the memory, bytes per second.
        half: FLOP/s of bf16 or fp16 products summed in float32.
        single: FLOP/s in float32, without TF32.
        device_name: words that `torch.cuda.get_device_name()` must contain, in lower case.
    """

    name: str
    memory: int
    bandwidth: float
    half: float
    single: float
    device_name: tuple[str, ...]


def _gpu(name: str, gib: int, terabytes: float, half: float, single: float, *device_name: str) -> Gpu:
    return Gpu(name, gib * _GIB, terabytes * _TERA, half * _TERA, single * _TERA, device_name)


# Figures "with sparsity" are halved here. Where several entries match a device's name, the first one counts.
_GPUS = (
    _gpu("h100-nvl-94g", 94, 3.9, 835.5, 60.0, "h100", "nvl"),  # NVIDIA H100 data sheet
    _gpu("h100-pcie-80g", 80, 2.0, 756.0, 51.0, "h100", "pcie"),
    _gpu("h100-80g", 80, 3.35, 989.4, 67.0, "h100"),  # SXM
    _gpu("h200-141g", 141, 4.8, 989.4, 67.0, "h200"),  # NVIDIA H200 data sheet
    _gpu("b200-180g", 180, 7.7, 2250.0, 75.0, "b200"),  # NVIDIA HGX B200 data sheet, one eighth
    _gpu("a100-80g", 80, 2.039, 312.0, 19.5, "a100", "80gb"),  # NVIDIA A100 data sheet
    _gpu("a100-40g", 40, 1.555, 312.0, 19.5, "a100"),
    _gpu("l40s-48g", 48, 0.864, 362.05, 91.6, "l40s"),  # NVIDIA L40S data sheet
    _gpu("l4-24g", 24, 0.3, 121.0, 30.3, "l4"),  # NVIDIA L4 data sheet
    _gpu("a10-24g", 24, 0.6, 125.0, 31.2, "a10"),  # NVIDIA A10 data sheet
    _gpu("a6000-48g", 48, 0.768, 154.8, 38.7, "rtx", "a6000"),  # NVIDIA RTX A6000 data sheet
    _gpu("rtx4090-24g", 24, 1.008, 165.2, 82.6, "rtx", "4090"),  # NVIDIA Ada architecture paper, FP32 accumulation
    _gpu("rtx3090-24g", 24, 0.936, 71.0, 35.6, "rtx", "3090"),  # NVIDIA Ampere GA102 paper, FP32 accumulation
    _gpu("mi300x-192g", 192, 5.3, 1307.4, 163.4, "mi300x"),  # AMD Instinct MI300X data sheet
)
GPUS = {gpu.name: gpu for gpu in _GPUS}
"""Every known GPU by the name that `--gpu` takes."""


def find_gpu(name: str) -> Gpu:
    """Return the GPU called `name`; an unknown one is a `UserError` with the nearest names."""
    if name not in GPUS:
        raise UserError(f"unknown GPU {name!r}.{did_you_mean(name, GPUS)}")
    return GPUS[name]


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the peak FLOP/s of a device, or None where it is not in the table.

    Args:
        device_name: from `torch.cuda.get_device_name()`, for instance 'NVIDIA H100 80GB HBM3'.
        precision: of a config: fp32, amp_bf16 or amp_fp16.
    """
    words = device_name.lower().replace("-", " ").replace("_", " ").split()
    for gpu in _GPUS:
        if all(word in words for word in gpu.device_name):
            return gpu.single if precision == "fp32" else gpu.half
    return None
