"""How many parameters a model has: counted on the model itself, built without memory."""

import dataclasses

from llip.configs import Config
from llip.open_clip.costs.shapes import fewest_tokens, meta_model
from llip.open_clip.factory import ModelSpec, model_spec
from llip.open_clip.towers.locks import lock_towers
from llip.training.step.optimizer import decays


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        mixture_tokens: beyond the library's own image tower, the rows of further tokens and of their positions.
        pooling: of the head. other: scale and bias. in_products: those of matrix products, copied to half precision.
    """

    image_tower: int
    text_tower: int
    mixture_tokens: int
    pooling: int
    other: int
    in_products: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.image_tower + self.text_tower + self.mixture_tokens + self.pooling + self.other


def count_parameters(spec: ModelSpec) -> Parameters:
    """Return the numbers of parameters of a model, exactly."""
    model = meta_model(spec)
    counts = dict.fromkeys(("visual", "text", "pooling", "other"), 0)
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        counts[part if part in counts else "other"] += parameter.numel()
    fewest = dataclasses.replace(spec, mixture_tokens=fewest_tokens(spec))
    more = counts["visual"] - sum(p.numel() for p in meta_model(fewest).visual.parameters())
    return Parameters(
        image_tower=counts["visual"] - more,
        text_tower=counts["text"],
        mixture_tokens=more,
        pooling=counts["pooling"],
        other=counts["other"],
        in_products=sum(p.numel() for name, p in model.named_parameters() if decays(name, p)),
    )


def trained_in_towers(config: Config) -> int:
    """Return how many parameters of the two towers the run trains."""
    model = meta_model(model_spec(config))
    lock_towers(model, config.lock_image, config.lock_text)
    return sum(p.numel() for tower in (model.visual, model.text) for p in tower.parameters() if p.requires_grad)
