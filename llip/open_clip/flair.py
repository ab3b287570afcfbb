"""FLAIR's pooling (Xiao et al., CVPR 2025): a caption attends to an image's patches, or to nothing.

Shapes: B images, T texts, P attended tokens of an image (patches, mixture tokens or both), M heads, D embedding width,
d = D / M.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llip.open_clip.pooling import Pooling, unit_norm
from llip.open_clip.scores import similarity
from llip.open_clip.scores.gram import full_precision


class FlairPooling(Pooling):
    """PyTorch's MultiheadAttention with a zero key, the text as query, after a LayerNorm on each of its inputs.

        q_j = W_Q LN_q(t_j) + b_Q,  k_ip = W_K LN_k(h_ip) + b_K,  v_ip = W_V LN_v(h_ip) + b_V,  k_i0 = v_i0 = 0
        w_ijmp = softmax over p = 0, 1, ... of (q_jm . k_ipm / sqrt(d))
        z_ij = W_O concat_m( sum_p w_ijmp v_ipm ) + b_O, at unit norm

    Our reading: the text enters at norm sqrt(D), where LayerNorm's epsilon has no effect. The text-free feature is the
    first token, FLAIR's class token. `softmax_temperature` has no effect.
    """

    extra_keys = 1  # the zero key

    def __init__(self, width: int, heads: int) -> None:
        """Build the head of `heads` heads M; `width` is D, divisible by M."""
        super().__init__()
        self.heads = heads
        # of FLAIR's names and start; its forward pass serves no pairs
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True, add_zero_attn=True)
        self.ln_q, self.ln_k, self.ln_v = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    @classmethod
    def build(cls, mixture_tokens: int, width: int, heads: int, temperature: float) -> "FlairPooling":
        return cls(width, heads)

    def _split(self, x: Tensor, part: int) -> Tensor:
        """Project normalised inputs [..., D] to queries, keys or values (`part` 0, 1, 2) [..., M, d]."""
        weight, bias = (x.chunk(3)[part] for x in (self.attn.in_proj_weight, self.attn.in_proj_bias))
        return F.linear(x.to(weight.dtype), weight, bias).unflatten(-1, (self.heads, -1))

    def _normalised_text(self, t: Tensor) -> Tensor:
        return self.ln_q((t * t.shape[-1] ** 0.5).to(self.ln_q.weight.dtype))

    def _with_zero(self, h: Tensor, norm: nn.LayerNorm, part: int) -> Tensor:
        normalised = norm(self.attended(h).to(norm.weight.dtype))
        return F.pad(self._split(normalised, part).transpose(1, 2), (0, 0, 0, 1))

    def keys(self, h: Tensor) -> Tensor:
        """Return keys [B, M, P + 1, d], the zero key last."""
        return self._with_zero(h, self.ln_k, 1)

    def values(self, h: Tensor) -> Tensor:
        """Return values [B, M, P + 1, d], the zero value last."""
        return self._with_zero(h, self.ln_v, 2)

    def _all_weights(self, h: Tensor, t: Tensor) -> Tensor:
        """Return the weights [B, T, M, P + 1], the zero key's last."""
        keys, queries = self.keys(h), self._split(self._normalised_text(t), 0)
        logits = torch.einsum("tmd,bmpd->btmp", queries, keys) * keys.shape[-1] ** -0.5
        return full_precision(logits).softmax(dim=-1)

    def mixture_weights(self, h: Tensor, t: Tensor) -> Tensor:
        """Return the weights [B, T, M, P]; what they lack to one is the weight of nothing."""
        return self._all_weights(h, t)[..., :-1]

    def contextualize(self, h: Tensor, t: Tensor) -> Tensor:
        weights = self._all_weights(h, t)
        mixed = torch.einsum("btmp,bmpd->btmd", weights, self.values(h).to(weights.dtype)).flatten(2)
        return unit_norm(self.attn.out_proj(mixed.to(self.attn.out_proj.weight.dtype)))

    def global_feature(self, h: Tensor) -> Tensor:
        return unit_norm(h[:, 0])

    def scores(self, h: Tensor, t: Tensor, memory_budget: int | None = None) -> Tensor:
        """See `Pooling`. Exact, through the tiles of `scores.similarity`, with rows and columns that stand for biases.

        Weights of a head sum to one, so one more coordinate of value 1 carries b_O, as one more column of W_O. Queries
        see LN_q(t_j) and a constant, for b_Q; targets see t_j: both are parts of one longer text vector.
        """
        keys, values = self.keys(h).transpose(0, 1), self.values(h).transpose(0, 1)
        heads, width, size = self.heads, t.shape[1], keys.shape[3]
        spare = 1 if h.device.type == "cpu" else 8  # GPUs want rows of a multiple of 8
        values = torch.cat([values, _constant(values, spare)], dim=3)
        bias = F.pad(self.attn.out_proj.bias[:, None, None], (0, spare - 1, 0, heads - 1))  # [D, M, spare]
        out = torch.cat([self.attn.out_proj.weight.unflatten(1, (heads, size)), bias], dim=2).flatten(1)
        normalised = self._normalised_text(t)
        parts = (normalised, torch.ones_like(normalised[:, :1]), t)
        texts = torch.cat([full_precision(part) for part in parts], dim=1)  # [T, 2D + 1]
        query_parts = (self.attn.in_proj_weight.chunk(3)[0], self.attn.in_proj_bias.chunk(3)[0][:, None])
        query = F.pad(torch.cat(query_parts, dim=1), (0, width))  # [D, 2D + 1]
        out = F.pad(out, (0, 0, width + 1, 0))  # [2D + 1, M (d + spare)]
        return similarity.pairwise_scores(keys, values, texts, query, out, size**-0.5, memory_budget=memory_budget)


def _constant(values: Tensor, count: int) -> Tensor:
    """Return `count` further coordinates of values [M, B, P, d]: a one, then zeros."""
    return F.pad(torch.ones_like(values[..., :1]), (0, count - 1))
