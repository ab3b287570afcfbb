"""The ladder of poolings: how an image's K mixture tokens become the feature that a caption is compared with.

Shapes: B images, T texts, K mixture tokens, M heads, D embedding width, d = D / M.

Each pooling answers the same calls. The text-free ones (first, mean, learned) give one feature per image; only
text-conditioned pooling (Llip paper, section 3; METHOD "Model", 3) gives one per image and text.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llip.extensions import find_extension
from llip.open_clip.scores import similarity
from llip.open_clip.scores.gram import full_precision

NORM_EPS = 1e-6
"""Norms below this count as this, so that features of degenerate tokens stay finite."""


def unit_norm(x: Tensor) -> Tensor:
    """Scale the last dimension to unit norm, in float32 (float64 stays)."""
    return F.normalize(full_precision(x), dim=-1, eps=NORM_EPS)


class Pooling(nn.Module):
    """What every pooling answers."""

    optional_biases: tuple[str, ...] = ()
    """Parameters that the pooling has only if its weights bring them."""
    extra_keys: int | None = None
    """Keys per image beside the tokens that texts attend to; None: texts attend to none, scores are inner products."""
    first_pair_token = 0
    """Where the tokens that texts attend to begin in `h`: at K where a config's `pair_tokens` is patches."""

    @classmethod
    def build(cls, mixture_tokens: int, width: int, heads: int, temperature: float) -> "Pooling":
        """Return the pooling of a config (`mixture_tokens`, embedding width, `pool_heads`, `softmax_temperature`)."""
        raise NotImplementedError

    def scores(self, h: Tensor, t: Tensor, memory_budget: int | None = None) -> Tensor:
        """Return cosines [B, T] of images [B, K, D] and unit-norm texts [T, D], in float32.

        Args:
            h: mixture tokens, followed by patches [B, K + L, D] where a config's `pair_tokens` asks for them.
            t: text features.
            memory_budget: bytes that tiles of pairs may take; the default of `scores.plan` when None.
        """
        raise NotImplementedError

    def global_feature(self, h: Tensor) -> Tensor:
        """Return one unit-norm feature per image [B, D] that no text conditions, of what `scores` takes as `h`.

        It is the feature conditioned on the zero vector, to which all mixture tokens are alike.
        """
        return self.contextualize(h, h.new_zeros(1, h.shape[2]))[:, 0]

    def global_scores(self, h: Tensor, t: Tensor) -> Tensor:
        """Return cosines [B, T] of the global features and unit-norm texts [T, D]."""
        with torch.autocast(h.device.type, enabled=False):
            z = self.global_feature(h)
            return z @ t.to(z.dtype).T

    def contextualize(self, h: Tensor, t: Tensor) -> Tensor:
        """Return the unit-norm features z [B, T, D], formed one by one: the reference, for small B x T."""
        raise NotImplementedError

    def mixture_weights(self, h: Tensor, t: Tensor) -> Tensor:
        """Return the weights over mixture tokens [B, T, M, K], in float32 (M = 1 without text conditioning)."""
        raise NotImplementedError

    def attended(self, h: Tensor) -> Tensor:
        """Return the tokens that texts attend to, of what `scores` takes as `h`."""
        return h[:, self.first_pair_token :]

    def adopt_biases(self, state: dict[str, Tensor]) -> None:
        """Make room for those optional biases that `state` (the pooling's, without prefix) brings."""


class TextFreePooling(Pooling):
    """One weighting of the K tokens for every caption: the lower rungs of the paper's ablation (its figure 3)."""

    def __init__(self, mixture_tokens: int) -> None:
        super().__init__()
        self.mixture_tokens = mixture_tokens

    @classmethod
    def build(cls, mixture_tokens: int, width: int, heads: int, temperature: float) -> "TextFreePooling":
        return cls(mixture_tokens)

    def token_weights(self) -> Tensor:
        """Return the weights over the mixture tokens [K], which sum to one."""
        raise NotImplementedError

    def forward(self, h: Tensor) -> Tensor:
        """Pool mixture tokens [B, K, D] to unit-norm features [B, D]."""
        h = full_precision(h)
        return unit_norm(torch.einsum("k,bkd->bd", self.token_weights().to(h.dtype), h))

    def global_feature(self, h: Tensor) -> Tensor:
        return self(h)

    def scores(self, h: Tensor, t: Tensor, memory_budget: int | None = None) -> Tensor:
        return self.global_scores(h, t)

    def contextualize(self, h: Tensor, t: Tensor) -> Tensor:
        return self(h)[:, None].expand(-1, t.shape[0], -1)

    def mixture_weights(self, h: Tensor, t: Tensor) -> Tensor:
        return self.token_weights().expand(h.shape[0], t.shape[0], 1, -1)


class FirstToken(TextFreePooling):
    """The first token is the feature; any others serve as registers. With K = 1 this is CLIP's class token."""

    weights: Tensor

    def __init__(self, mixture_tokens: int) -> None:
        super().__init__(mixture_tokens)
        self.register_buffer("weights", torch.eye(mixture_tokens)[0], persistent=False)

    def token_weights(self) -> Tensor:
        return self.weights

    def forward(self, h: Tensor) -> Tensor:
        return unit_norm(h[:, 0])


class MeanTokens(TextFreePooling):
    """The average of the K tokens."""

    weights: Tensor

    def __init__(self, mixture_tokens: int) -> None:
        super().__init__(mixture_tokens)
        self.register_buffer("weights", torch.full((mixture_tokens,), 1 / mixture_tokens), persistent=False)

    def token_weights(self) -> Tensor:
        return self.weights


class LearnedWeights(TextFreePooling):
    """Learned fixed weights over the K tokens: a softmax of K logits, the average at the start."""

    def __init__(self, mixture_tokens: int) -> None:
        super().__init__(mixture_tokens)
        self.weight_logits = nn.Parameter(torch.zeros(mixture_tokens))

    def token_weights(self) -> Tensor:
        return full_precision(self.weight_logits).softmax(dim=0)


class TextConditionedPooling(Pooling):
    """Multi-head cross-attention with the text as query and the image's mixture tokens as keys and values.

    Four D x D matrices without biases, and nothing else through which text could reach the feature: no query residual,
    no extra zero key, no text bias. With K = 1 the feature does not depend on the text.

    Our reading, where the paper does not settle the point: the text is a unit vector, so the query is rescaled by
    sqrt(D) before W_Q; so are the tokens before W_K (keys from token *directions*). All four matrices start as
    multiples of the identity: the feature starts as a mixture of the tokens themselves, and a text starts by listening
    to the tokens that point its own way, head by head. Random W_Q and W_K start behind the text-free poolings instead.
    """

    optional_biases = ("q_proj.bias", "v_proj.bias")
    extra_keys = 0

    def __init__(self, width: int, heads: int, temperature: float) -> None:
        """Build the head.

        Args:
            width: D, divisible by `heads`.
            heads: M.
            temperature: tau, divides the attention logits instead of sqrt(d).
        """
        super().__init__()
        assert width % heads == 0, f"width {width} is not divisible by {heads} heads"
        self.heads, self.temperature = heads, temperature
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        # 1/sqrt(3): the spread of attention logits that PyTorch's default initialisation gives, which tau is meant for
        gains = {self.q_proj: 3**-0.5, self.k_proj: 3**-0.5, self.v_proj: 1.0, self.out_proj: 1.0}
        for projection, gain in gains.items():
            projection.weight.data.copy_(gain * torch.eye(width))

    @classmethod
    def build(cls, mixture_tokens: int, width: int, heads: int, temperature: float) -> "TextConditionedPooling":
        return cls(width, heads, temperature)

    def adopt_biases(self, state: dict[str, Tensor]) -> None:
        for name in self.optional_biases:
            projection = getattr(self, name.removesuffix(".bias"))
            if name in state and projection.bias is None:
                projection.bias = nn.Parameter(torch.zeros_like(projection.weight[0]))

    def _split(self, x: Tensor) -> Tensor:
        """[N, D] or [N, K, D] -> [N, M, d] or [N, K, M, d]."""
        return x.unflatten(-1, (self.heads, -1))

    def keys(self, h: Tensor) -> Tensor:
        """Return keys [B, M, K, d] of mixture tokens [B, K, D], or of what else texts attend to."""
        h = self.attended(h)
        return self._split(_project(self.k_proj, unit_norm(h) * h.shape[-1] ** 0.5)).transpose(1, 2)

    def values(self, h: Tensor) -> Tensor:
        """Return values [B, M, K, d] of mixture tokens [B, K, D], or of what else texts attend to."""
        return self._split(_project(self.v_proj, self.attended(h))).transpose(1, 2)

    def queries(self, t: Tensor) -> Tensor:
        """Return queries [T, M, d] of unit-norm texts [T, D], divided by the temperature."""
        bias = None if self.q_proj.bias is None else self.q_proj.bias / self.temperature
        t = t.to(self.q_proj.weight.dtype)
        return self._split(F.linear(t * self._query_gain(t), self.q_proj.weight, bias))

    def _query_gain(self, t: Tensor) -> float:
        return t.shape[-1] ** 0.5 / self.temperature

    def mixture_weights(self, h: Tensor, t: Tensor) -> Tensor:
        logits = torch.einsum("tmd,bmkd->btmk", self.queries(t), self.keys(h))
        return full_precision(logits).softmax(dim=-1)

    def contextualize(self, h: Tensor, t: Tensor) -> Tensor:
        weights = self.mixture_weights(h, t)
        mixed = torch.einsum("btmk,bmkd->btmd", weights, self.values(h).to(weights.dtype))
        return unit_norm(_project(self.out_proj, mixed.flatten(2)))

    def scores(self, h: Tensor, t: Tensor, memory_budget: int | None = None) -> Tensor:
        t = t.to(torch.promote_types(torch.float32, self.q_proj.weight.dtype))
        keys, values = self.keys(h).transpose(0, 1), self.values(h).transpose(0, 1)
        gain = self._query_gain(t)
        query: Tensor = self.q_proj.weight
        out: Tensor = self.out_proj.weight
        if self.q_proj.bias is not None:
            # One more text coordinate that only the queries see: W_O has no row for it, so neither z nor its norm does.
            query = torch.cat([query, self.q_proj.bias[:, None]], dim=1)
            out = F.pad(out, (0, 0, 0, 1))
            t = F.pad(t, (0, 1), value=t.shape[-1] ** -0.5)
        return similarity.pairwise_scores(keys, values, t, query, out, gain, memory_budget=memory_budget)


def _project(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply a projection in the dtype of its weight (or that of autocast), whatever the dtype of its input."""
    return linear(x.to(linear.weight.dtype))


def create_pooling(kind: str, mixture_tokens: int, width: int, heads: int, temperature: float) -> Pooling:
    """Return the pooling called `kind`: first, mean, learned, text, or path/to/file.py:Name."""
    return find_extension("pooling", kind).build(mixture_tokens, width, heads, temperature)
