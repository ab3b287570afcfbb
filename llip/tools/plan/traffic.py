"""What one GPU sends in a step, and what of it is hidden behind the backward pass.

Shapes: P parameters, G GPUs, T texts of the global batch, D embedding width.
"""

import dataclasses

from llip.configs import Config
from llip.open_clip.factory import model_spec

_FLOAT = 4
_BUCKET = 25 * 2**20
"""Bytes of the last bucket of gradients, which is ready only at the end of the backward pass (DDP's default size)."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in one step, all of them in ring collectives.

    Attributes:
        gradients: all-reduce of all gradients, float32. It overlaps with the backward pass (under accumulation: of the
            last micro-batch), but for the last bucket. With sharded weights (fsdp): their all-gather in each forward
            and backward pass of each micro-batch, and the reduce-scatter of its gradients.
        texts: all-gather of the text features; nothing overlaps with it.
        text_gradients: their reduce-scatter, between the backward passes of the head and of the text tower.
        normalisers: all-reduces of the softmax's column normalisers; 0 under the sigmoid loss.
        overlapped: the part of the gradients that the backward pass hides.
    """

    gradients: int
    texts: int
    text_gradients: int
    normalisers: int
    overlapped: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.gradients + self.texts + self.text_gradients + self.normalisers

    @property
    def exposed(self) -> int:
        """Bytes that the step waits for."""
        return self.total - self.overlapped


def step_traffic(config: Config, parameters: int) -> Traffic:
    """Return the traffic of one step of a model with that number of parameters."""
    gpus, width = config.processes, model_spec(config).architecture["embed_dim"]
    # a ring sends (G - 1) / G of the data, once to gather or to reduce and scatter, twice to all-reduce
    others = (gpus - 1) / gpus
    passes = 2
    if config.distributed_engine == "fsdp":  # forward, backward, gradients; one more forward pass under accumulation
        passes = 3 if config.accum_freq == 1 else 4 * config.accum_freq
    gradients = round(passes * others * _FLOAT * parameters)
    texts = round(others * _FLOAT * config.global_texts * width)
    normalisers = 2 * round(2 * others * _FLOAT * config.global_texts) if config.loss.startswith("softmax") else 0
    return Traffic(gradients, texts, texts, normalisers, max(0, gradients - round(2 * others * _BUCKET)))
