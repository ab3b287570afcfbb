"""Bytes that the scores of a step read and write in the GPU's memory, which is what bounds their time.

Shapes: B images of a process, T captions of the global batch, K mixture tokens, M heads, D embedding width, d = D / M.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llip.configs import Config
from llip.open_clip.costs.flops import keys_per_image, score_plan_of
from llip.open_clip.factory import model_spec
from llip.open_clip.model import autocast_dtype
from llip.open_clip.scores.similarity import pairwise_scores


class ByteCounter(TorchDispatchMode):
    """Sums the bytes of what each operation reads and writes; views and empty tensors move none."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        name = function.__name__
        if function.namespace == "aten" and not function.is_view and "view" not in name and "empty" not in name:
            self.total += sum(x.nbytes for x in tree_leaves((args, kwargs, output)) if isinstance(x, Tensor))
        return output


def score_bytes(config: Config) -> int:
    """Return the bytes that one process's scores move in a step, forward and backward; 0 without text conditioning.

    The code that computes them is run on tensors without memory, tile by tile as the run will. Where tiles are computed
    twice, two of them in the direction of the images stand for all.
    """
    spec = model_spec(config)
    plan, keys_of_image = score_plan_of(config, spec), keys_per_image(spec)
    if plan is None or keys_of_image is None:
        return 0
    width, dtype = spec.architecture["embed_dim"], autocast_dtype(config.precision) or torch.float32
    images = all_images = config.batch_size * config.accum_freq
    if not plan.keep:
        images = min(all_images, 2 * plan.tile_images)
    by_head = (spec.pool_heads, images, keys_of_image, width // spec.pool_heads)
    with FakeTensorMode(), ByteCounter() as counter:
        keys, values = (torch.empty(by_head, dtype=dtype, requires_grad=True) for _ in range(2))
        texts, query, out = (torch.empty(n, width, requires_grad=True) for n in (config.global_texts, width, width))
        scores = pairwise_scores(
            keys,
            values,
            texts,
            query,
            out,
            form=plan.form,
            tile=(plan.tile_images, plan.tile_texts),
            memory_budget=plan.budget * images // all_images,  # in proportion: tiles are kept if those of the run are
        )
        scores.backward(torch.empty_like(scores))
    return counter.total * all_images // images
