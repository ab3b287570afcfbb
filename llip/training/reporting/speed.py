"""How fast a run is, in units that compare across models: tokens, FLOP/s, and the share of what the GPU could do."""

import torch

from llip.configs import Config
from llip.open_clip.costs.flops import flops_per_pair, image_tower, text_tower
from llip.open_clip.factory import model_spec
from llip.system.gpus import peak_flops
from llip.system.processes import Processes


class Speed:
    """Turns pairs per second into the other figures."""

    def __init__(self, config: Config, processes: Processes) -> None:
        """Count what one pair costs.

        Args:
            config: the run.
            processes: of the run.
        """
        spec = model_spec(config)
        self.tokens = image_tower(spec).tokens + text_tower(spec).tokens
        self.flops = flops_per_pair(config)
        name = torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else ""
        peak = peak_flops(name, config.precision)
        self.peak = peak * processes.world_size if peak else None

    def record(self, pairs_per_second: float) -> dict[str, float | None]:
        """Return the fields of metrics.jsonl.

        tokens_per_second: positions of both towers' sequences, after patch dropout. tflops: model FLOPs in 10^12 per
        second, all processes together, recomputation not counted. mfu: their share of the GPUs' peak, None where the
        device is not in the table of `llip.tools.plan`.
        """
        rate = pairs_per_second * self.flops
        return {
            "tokens_per_second": pairs_per_second * self.tokens,
            "tflops": rate / 1e12,
            "mfu": rate / self.peak if self.peak else None,
        }
