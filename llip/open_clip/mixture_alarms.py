"""What looks collapsed, in words: limits on the measures. They are ours, rough, and meant to catch what is far off."""

from collections.abc import Mapping

FEWEST_TOKENS = 0.1
"""Share of the K tokens below which the effective number of used ones counts as a collapse (and always below 1.5)."""

MOST_SIMILAR = 0.995
"""Mean cosine of two tokens of one image from which they count as copies."""

LEAST_TEXT_SHARE = 0.005
"""Share of variance that must lie between texts, of weights and of z, for a model that conditions on the text."""

LEAST_RANK = 0.02
"""Share of the width that the features' effective rank must reach."""


def find_alarms(
    measures: Mapping[str, float],
    tokens: int,
    text_conditioned: bool,
    width: int | None = None,
    has_temperature: bool = True,
) -> list[str]:
    """Return one sentence for each sign of a collapse, none where all is well.

    Args:
        measures: as `mixture_measures` returns them; with `rank` where it is known.
        tokens: K.
        text_conditioned: the pooling conditions on the text.
        width: D, or the number of features if that is smaller; needed with `rank`.
        has_temperature: the pooling divides its attention logits by `softmax_temperature`.
    """
    alarms = []
    spread, sharpen = "a larger softmax_temperature spreads the weights", "a smaller softmax_temperature sharpens them"
    if not has_temperature:  # the projections alone learn how sharp the weights are
        spread, sharpen = "try a smaller lr or a longer warmup", "train longer, or with a smaller global_loss_weight"
    fewest = max(1.5, FEWEST_TOKENS * tokens)
    if tokens > 2 and text_conditioned and measures["usage_effective"] < fewest:
        alarms.append(
            f"few tokens are used: {measures['usage_effective']:.1f} of {tokens} in effect (expected {fewest:.1f} or "
            f"more); {spread}"
        )
    if tokens > 1 and measures["token_similarity"] > MOST_SIMILAR:
        alarms.append(
            f"the tokens of an image are nearly copies of each other: mean cosine {measures['token_similarity']:.4f} "
            f"(expected below {MOST_SIMILAR}); train longer, or seed them further apart"
        )
    if tokens > 1 and text_conditioned:
        for name, what in (("weight_text_share", "weights over tokens"), ("z_text_share", "image features")):
            if measures[name] < LEAST_TEXT_SHARE:
                alarms.append(
                    f"the {what} hardly change with the caption: {100 * measures[name]:.2f} % of their variance "
                    f"(expected {100 * LEAST_TEXT_SHARE} % or more); {sharpen}"
                )
    if "rank" in measures:
        assert width is not None, "the rank is judged by the width"
        if measures["rank"] < LEAST_RANK * width:
            alarms.append(
                f"the features lie in few directions: effective rank {measures['rank']:.1f} (expected "
                f"{LEAST_RANK * width:.1f} or more)"
            )
    return alarms
