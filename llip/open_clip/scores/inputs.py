"""What scores are computed from, and the projections of texts that every way to compute them needs.

Shapes: B images, T texts, K mixture tokens, M heads, D embedding width, d = D / M.
"""

from typing import NamedTuple

from torch import Tensor


class ScoreInputs(NamedTuple):
    """What scores are computed from (see `similarity.pairwise_scores`), or the gradients of these."""

    keys: Tensor  # [M, B, K, d]
    values: Tensor  # [M, B, K, d]
    texts: Tensor  # [T, D]
    query_weight: Tensor  # [D, D], the gain included
    out_weight: Tensor  # [D, D]
    shared: Tensor  # W_O^T W_O [D, D]

    def project(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Return queries and targets W_O^T t_j [M, d, t] of some texts, in the dtype of the keys."""
        texts = self.texts[columns].to(self.keys.dtype).T
        queries, targets = (weight.to(texts.dtype) @ texts for weight in (self.query_weight, self.out_weight.T))
        by_head = (len(self.keys), -1)
        return queries.unflatten(0, by_head), targets.unflatten(0, by_head)

    def images(self, images: slice) -> tuple[Tensor, Tensor]:
        """Return keys and values of some images."""
        return self.keys[:, images], self.values[:, images]

    def add_projected(self, columns: slice, of_queries: Tensor, of_targets: Tensor, gradients: "ScoreInputs") -> None:
        """Add to `gradients` what the gradients [D, t] of the queries and targets of some texts give."""
        texts = self.texts[columns].to(gradients.texts.dtype)
        for of_projected, weight, of_weight in (
            (of_queries, self.query_weight, gradients.query_weight),
            (of_targets, self.out_weight.T, gradients.out_weight.T),
        ):
            of_weight.addmm_(of_projected, texts)
            gradients.texts[columns].addmm_(of_projected.T, weight.to(of_projected.dtype))
