"""The predicted size of frozen features is that of what is written; no size where nothing is frozen."""

import os

from llip.config_search import search_config
from llip.open_clip.factory import model_spec
from llip.system.gpus import find_gpu
from llip.tools.encode.encode import encode
from llip.tools.plan.cache_size import cache_size
from llip.tools.plan.estimate import make_plan
from llip.tools.plan.table import as_table
from tests.helpers import tiny_run


def test_the_size_is_that_of_the_written_shards(tmp_path):
    config = tiny_run(tmp_path, lock_image=True, lock_text=True, mixture_tokens=1, image_crop="center")
    size = cache_size(config, model_spec(config))
    assert size is not None
    assert size.shape == (1, 16)
    encode(config, tmp_path / "cache", "fp16")
    written = sum(os.path.getsize(tmp_path / "cache" / f"0000{number}.tar") for number in range(2))
    assert size.total <= written <= size.total + 32 * 1024 + 2 * 10240  # a text member each, and the ends of two tars
    assert "32 samples" in as_table(make_plan(config, find_gpu("h100-80g")))


def test_nothing_frozen_has_no_size():
    for fields in ((), ("lock_image=true",)):  # 32 mixture tokens of a locked tower are trained
        config = search_config("llip_b16_k32", fields)
        assert cache_size(config, model_spec(config)) is None
