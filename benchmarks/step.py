"""What the head costs: one training step of a config against the same encoder with pooling=first.

    python -m benchmarks.step llip_b16_k32 [captions_per_image=4 ...] [--texts 32768] [--device cuda] [--json]

One process stands for one GPU of the published run: `batch_size` images against `--texts` texts of the global batch,
of which its own come from its text tower and the others, which would arrive from other GPUs, are drawn at random. The
two models are timed one after the other; a step is both towers, scores, loss, backward pass and AdamW.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Sequence

import torch
from tqdm import tqdm

from benchmarks.measure import seconds
from llip.config_search import search_config
from llip.configs import ATTENTION_POOLINGS, Config
from llip.errors import UserError
from llip.extensions import find_extension
from llip.open_clip.costs.flops import keys_per_image
from llip.open_clip.factory import create_model, model_spec
from llip.open_clip.kernels.select import request_score_kernel
from llip.open_clip.model import Llip, autocast_dtype
from llip.open_clip.objectives.matches import Matches
from llip.open_clip.pooling import unit_norm
from llip.open_clip.scores.plan import plan_scores
from llip.system.program import program
from llip.training.step.optimizer import create_optimizer


class Stepper:
    """One model with its optimizer and a fixed batch."""

    def __init__(self, config: Config, texts: int, device: torch.device) -> None:
        torch.manual_seed(config.seed)
        request_score_kernel(config.score_kernel)
        spec = model_spec(config)
        self.config, self.device = config, device
        self.model: Llip = create_model(spec).to(device).train()
        if config.grad_checkpointing:
            self.model.set_grad_checkpointing()
        if config.torchcompile:
            self.model.visual.compile()
            self.model.text.compile()
        self.optimizer, self.loss = create_optimizer(self.model, config), find_extension("loss", config.loss).loss
        size = (config.batch_size, 3, spec.image_size, spec.image_size)
        self.images = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
        own = config.batch_size * config.captions_per_image
        self.tokens = torch.randint(1, 1000, (own, spec.context_length), device=device)
        width = spec.architecture["embed_dim"]
        self.others = unit_norm(torch.randn(texts - own, width, device=device))  # [T - B N, D]
        self.matches = Matches(config.batch_size, texts, config.captions_per_image)
        self.budget = None if config.score_memory is None else int(config.score_memory * 2**30)
        dtype = autocast_dtype(config.precision)
        self.autocast = contextlib.nullcontext if dtype is None else lambda: torch.autocast(device.type, dtype=dtype)

    def __call__(self) -> None:
        """Make one step."""
        model = self.model
        with self.autocast():
            h = model.encode_image(model.normalise(self.images))
            t = torch.cat([model.encode_text(self.tokens), self.others])  # [T, D]
            scores = model.similarity(h, t.requires_grad_(), self.budget)
        self.loss(scores, self.matches, model.logit_scale.exp(), model.logit_bias, None).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak_bytes(self) -> int | None:
        """Return the peak of device memory over one step; None on CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self()
        return torch.cuda.max_memory_allocated()


def _time(config: Config, texts: int, device: torch.device, steps: int) -> tuple[float, int | None]:
    """Return the median seconds of a step, and its peak of device memory; one model is in memory at a time."""
    stepper = Stepper(config, texts, device)
    times = [seconds(stepper, device) for _ in tqdm(range(steps + 2), unit="step", desc=config.pooling)]
    return statistics.median(times[2:]), stepper.peak_bytes()  # the first two warm up


def measure(config: Config, texts: int, device: torch.device, steps: int) -> dict:
    """Time the config's step against that of the same encoder with pooling=first.

    Raises:
        UserError: the config's own pooling is not text-conditioned, or there are fewer texts than images.
    """
    if keys_per_image(model_spec(config)) is None:
        expected = " or ".join(f"pooling={name}" for name in ATTENTION_POOLINGS)
        raise UserError(f"config {config.name!r} has pooling = {config.pooling!r}: expected one with {expected}")
    own = config.batch_size * config.captions_per_image
    if texts < own or texts % config.captions_per_image:
        raise UserError(f"--texts {texts}: expected at least batch_size x captions_per_image = {own}, in whole images")
    plain = config.replace(pooling="first", pair_tokens="mixture", global_loss_weight=0.0)
    if device.type == "cuda" and config.precision != "fp32":  # as training does
        torch.set_float32_matmul_precision("high")
    encoder, _ = _time(plain, texts, device, steps)
    step, peak = _time(config, texts, device, steps)
    spec = model_spec(config)
    budget = None if config.score_memory is None else int(config.score_memory * 2**30)
    plan = plan_scores(
        config.batch_size, texts, keys_per_image(spec), config.pool_heads, spec.architecture["embed_dim"],
        training=True, on_cpu=device.type == "cpu", budget=budget,
    )  # fmt: skip
    return {
        "config": config.name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu x {torch.get_num_threads()}",
        "images": config.batch_size,
        "texts": texts,
        "step_seconds": step,
        "first_seconds": encoder,
        "ratio": step / encoder,
        "head_share": (step - encoder) / step,
        "peak_bytes": peak,
        "predicted_score_bytes": plan.peak_bytes,
        "scores": str(plan),
    }


@program
def main(arguments: Sequence[str]) -> None:
    """Run the benchmark and print its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a config's name, or path/to/file.py:function")
    parser.add_argument("overrides", nargs="*", metavar="field=value")
    parser.add_argument("--texts", type=int, help="texts of the global batch; as the config has them by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="exactly one line of JSON on standard output")
    options = parser.parse_intermixed_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU was found; give --device cpu")
    config = search_config(options.config, options.overrides)
    result = measure(config, options.texts or config.global_texts, torch.device(options.device), options.steps)
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:>22}  {value}" for name, value in result.items()))


if __name__ == "__main__":
    sys.exit(main())
