"""Memory of one GPU by part, from shapes alone.

Shapes: B images of a process, T texts of the global batch, N tokens of a tower, W its
width, H width of the MLP, K mixture tokens, D embedding width.

Activations are what autograd keeps of a block for the backward pass, counted tensor by tensor as tests measure them.
A compiled tower keeps less: the partitioner of torch.compile keeps no copy of what it can compute from its neighbour.
"""

import dataclasses
import math

from llip.configs import Config
from llip.open_clip.costs.flops import image_tower, score_plan_of, text_tower
from llip.open_clip.costs.shapes import Tower
from llip.open_clip.factory import ModelSpec, model_spec
from llip.tools.plan.parameters import Parameters, count_parameters, trained_in_towers

FLOAT, HALF = 4, 2
RESERVED = int(1.5 * 2**30)
"""Bytes that we assume for the CUDA context, NCCL's buffers and cuBLAS workspaces."""

FRAGMENTATION = 0.05
"""Share of everything else that we assume to be lost between the allocator's blocks."""

_LOSS_NUMBERS = 1 << 24  # of the scores in temporaries at once, see `llip.open_clip.objectives.losses`


@dataclasses.dataclass(frozen=True)
class Widths:
    """Bytes of one number, by what it is."""

    product: int  # in and out of matrix products
    residual: int  # of the stream between blocks
    norm: int  # of a LayerNorm's kept input


def tower_widths(precision: str, residual_is_half: bool, norm_is_half: bool) -> Widths:
    """Return the bytes of a tower's numbers.

    Args:
        precision: of the config.
        residual_is_half: under autocast the image tower's stream is half wide (it starts with a product), the text
            tower's is not (it starts with an embedding).
        norm_is_half: LayerNorm's input is kept as it is: by the CPU's autocast, and by a compiled tower. CUDA's
            autocast keeps it in float32.
    """
    if precision == "fp32":
        return Widths(FLOAT, FLOAT, FLOAT)
    residual = HALF if residual_is_half else FLOAT
    return Widths(HALF, residual, residual if norm_is_half else FLOAT)


def block_bytes(tower: Tower, widths: Widths, quick_gelu: bool) -> int:
    """Return what one block keeps of one sample for the backward pass."""
    tokens, width = tower.tokens, tower.width
    norms = 2 * (tokens * width * widths.norm + 2 * tokens * FLOAT)  # input, mean, deviation
    # the normed input twice, queries, keys, values, and what attention gives; and the attention's normalisers
    attention = 6 * tokens * width * widths.product + tokens * tower.heads * FLOAT
    mlp = (3 if quick_gelu else 2) * tokens * tower.hidden * widths.product
    return norms + attention + mlp


def tower_bytes(tower: Tower, widths: Widths, quick_gelu: bool, checkpointing: bool) -> int:
    """Return what the blocks of a tower keep of one sample; with checkpointing their inputs and one block in full."""
    block = block_bytes(tower, widths, quick_gelu)
    if not checkpointing:
        return tower.layers * block
    return tower.layers * tower.tokens * tower.width * widths.residual + block


def _ends_bytes(tower: Tower, widths: Widths) -> int:
    """Return what the norms before (image tower only) and behind the blocks keep of one sample."""
    first = tower.tokens if tower.stem else 0
    # a norm of few outputs keeps the whole stream, of which they are a part, unless they are converted for it
    last = tower.tokens if widths.norm == widths.residual else tower.projected
    return (first + last) * (tower.width * widths.norm + 2 * FLOAT) + tower.projected * tower.width * widths.product


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one GPU by part at the largest moment of a step."""

    weights: int
    half_weights: int  # copies in the precision of the products
    gradients: int
    optimizer: int
    images: int  # pixels, and what the tower's stem keeps
    image_activations: int
    text_activations: int
    features: int  # mixture tokens, texts of the global batch, and their gradients
    scores: int  # the matrix of scores with its gradient
    score_tiles: int
    working: int  # temporaries of one block's backward pass, beyond what the score tiles have left free
    reserved: int
    fragmentation: int

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(dataclasses.asdict(self).values())


def activations(config: Config, spec: ModelSpec, checkpointing: bool, norm_is_half: bool = False) -> tuple[int, int]:
    """Return the bytes that the blocks of the image and the text tower keep for one micro-batch."""
    quick_gelu = spec.architecture["quick_gelu"] and not config.torchcompile  # which keeps no product of the two
    norm_is_half = norm_is_half or config.torchcompile
    image, text = image_tower(spec, lock=config.lock_image), text_tower(spec, config.lock_text)
    captions, kept = config.batch_size * config.captions_per_image, []
    for count, tower, is_image in ((config.batch_size, image, True), (captions, text, False)):
        widths = tower_widths(config.precision, is_image, norm_is_half)
        blocks = tower_bytes(tower, widths, quick_gelu, checkpointing) + _ends_bytes(tower, widths)
        kept.append(count * (blocks + tower.kept * widths.product))
    # nothing is kept of a tower that is locked in full, or but for its projection
    is_locked = config.lock_image is True and spec.mixture_tokens == 1
    return 0 if is_locked else kept[0], 0 if config.lock_text else kept[1]


def parameters_on_gpu(config: Config, parameters: Parameters) -> tuple[int, int]:
    """Return how many parameters a GPU holds, and of how many it holds gradients and optimizer state.

    Under `distributed_engine=fsdp` the towers are sharded over all processes; the reserve covers the unsharded block.
    """
    processes = config.processes if config.distributed_engine == "fsdp" else 1
    image, text = parameters.image_tower + parameters.mixture_tokens, parameters.text_tower
    head = parameters.pooling + parameters.other
    trained = trained_in_towers(config) if config.lock_image or config.lock_text else image + text
    return -(-(image + text) // processes) + head, -(-trained // processes) + head


def gpu_memory(config: Config, checkpointing: bool | None = None, parameters: Parameters | None = None) -> Memory:
    """Return the memory of one GPU at the largest moment of a step.

    Args:
        config: the run.
        checkpointing: instead of the config's `grad_checkpointing`.
        parameters: of the model, where they have been counted already.
    """
    spec = model_spec(config)
    parameters = parameters or count_parameters(spec)
    checkpointing = config.grad_checkpointing if checkpointing is None else checkpointing
    product = FLOAT if config.precision == "fp32" else HALF
    held, trained = parameters_on_gpu(config, parameters)
    width, images, texts = spec.architecture["embed_dim"], config.batch_size * config.accum_freq, config.global_texts
    captions = config.captions_per_image
    towers = activations(config, spec, checkpointing)
    plan = score_plan_of(config, spec)
    tokens = image_tower(spec).projected
    pixels = 3 * spec.image_size**2
    image, text = image_tower(spec), text_tower(spec)
    # h, its direction, keys and values, and the gradients of all these; texts, gathered, with gradients
    features = FLOAT * (8 * images * tokens * width + 3 * texts * width)
    if plan is None:
        features = FLOAT * (images * (2 * tokens + 2) * width + 3 * texts * width)
    matrices = 4 if config.global_loss_weight else 2  # each with its gradient
    scores = FLOAT * (matrices * images * texts + 2 * min(images * texts, _LOSS_NUMBERS))
    tiles = plan.peak_bytes if plan else 0
    if config.accum_freq > 1:  # scores come when no activations are there: the larger of the two counts
        kept = FLOAT * 2 * images * (tokens + captions) * width
        if sum(towers) >= scores + tiles + features - kept:
            features, scores, tiles = kept, 0, 0
        else:
            towers = (0, 0)
    # the gradients of an MLP's hidden layer: of what goes in, what comes out, and one more while both are there
    hidden = max(image.tokens * image.hidden, captions * text.tokens * text.hidden)
    working = config.batch_size * product * 3 * hidden
    parts = {
        "weights": FLOAT * (held + (parameters.total if config.ema_decay is not None else 0)),
        "half_weights": HALF * parameters.in_products if product == HALF else 0,
        "gradients": FLOAT * trained,
        "optimizer": 2 * FLOAT * trained,
        "images": config.batch_size * pixels * (1 + product) if sum(towers) else config.batch_size * pixels,
        "image_activations": towers[0],
        "text_activations": towers[1],
        "features": features,
        "scores": scores,
        "score_tiles": tiles,
        "working": max(0, working - tiles),
    }
    return Memory(**parts, reserved=RESERVED, fragmentation=math.ceil(FRAGMENTATION * sum(parts.values())))
