"""The size of the features that `llip encode` would write for a run."""

import dataclasses

from llip.configs import Config
from llip.data.features.cache import cached_parts
from llip.data.features.made_with import check_frozen, feature_format
from llip.errors import UserError
from llip.open_clip.costs.shapes import meta_model
from llip.open_clip.factory import ModelSpec
from llip.open_clip.towers.locks import lock_towers


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """Bytes of features in fp16; int8 takes about half.

    Attributes:
        shape: L features of an image, of width W.
        image: bytes of an image.
        captions: bytes of `captions_per_image` captions of an image; 0 where the text encoder is trained.
        samples: images of the data.
    """

    shape: tuple[int, int]
    image: int
    captions: int
    samples: int

    @property
    def total(self) -> int:
        """Bytes of the data."""
        return self.samples * (self.image + self.captions)


def cache_size(config: Config, spec: ModelSpec) -> CacheSize | None:
    """Return the size of a run's frozen features, None where its locks leave none.

    Raises:
        UserError: the model does not have what the config locks.
    """
    images, texts = cached_parts(config)
    if not images:
        return None
    model = meta_model(spec)
    lock_towers(model, config.lock_image, config.lock_text)
    try:
        check_frozen(model, texts)
    except UserError:
        return None
    form = feature_format(spec, model.eval(), "fp16", texts)
    captions = form.text_bytes(config.captions_per_image)
    return CacheSize(form.image, form.image_bytes(), captions, config.train_num_samples)
