"""Speed of a run in units that compare across models: tokens per second, FLOP/s, MFU."""

import torch

from llip.configs import Config
from llip.open_clip.costs.flops import flops_per_image, image_tower, text_tower
from llip.open_clip.factory import model_spec
from llip.system.gpus import peak_flops
from llip.system.processes import Processes


class Speed:
    """Converts images per second to the other units."""

    def __init__(self, config: Config, processes: Processes) -> None:
        """Compute the cost of one image with its texts.

        Args:
            config: the run's config.
            processes: of the run.
        """
        spec = model_spec(config)
        self.tokens = image_tower(spec).tokens + config.captions_per_image * text_tower(spec).tokens
        self.flops = flops_per_image(config)
        name = torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else ""
        peak = peak_flops(name, config.precision)
        self.peak = peak * processes.world_size if peak else None

    def record(self, images_per_second: float) -> dict[str, float | None]:
        """Return the fields of metrics.jsonl.

        tokens_per_second: tokens of both towers, after patch dropout. tflops: model FLOPs in 10^12 per second over all
        processes, without recomputation. mfu: their fraction of the GPUs' peak; None where the device is not in
        `llip.system.gpus`.
        """
        rate = images_per_second * self.flops
        return {
            "tokens_per_second": images_per_second * self.tokens,
            "tflops": rate / 1e12,
            "mfu": rate / self.peak if self.peak else None,
        }
