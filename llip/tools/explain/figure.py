"""The figure: one block per image, with its scores, its weights over mixture tokens, and maps over its patches.

Shapes: T captions, M heads, K mixture tokens, H x W patches.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from llip.errors import UserError
from llip.tools.explain.explanation import Explanation, effective_tokens, tokens_that_matter
from llip.tools.fonts import font_families, shorten, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

SIDE = 192  # pixels of one image in the figure
INK, PALE, ACCENT = "#26323f", "#c3ccd6", "#1f6fb4"
HEAT = "Blues"
DARK = 0.12  # brightness where the attention is zero
_WRAP = 34  # characters of a caption beside the bars
_BY_HEAD = 512  # columns of the weights by head that are still legible


def draw(explanation: Explanation, images: list[Image.Image], path: Path, tokens: int) -> None:
    """Write the figure.

    Args:
        explanation: of the images.
        images: in its order; drawn as the model sees them (center crop, or squashed).
        path: .png, .pdf or .svg.
        tokens: number of token maps per image.

    Raises:
        UserError: the file cannot be written.
    """
    import matplotlib  # slow to import
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    count, captions = len(images), len(explanation.captions)
    shown = min(tokens, explanation.weights.shape[-1])
    maps = (captions if explanation.text_conditioned else 1) + shown if explanation.attention is not None else 0
    width = max(11.0, 1.3 * maps)
    upper, lower = 0.9 + 0.42 * max(captions, 3), (min(1.8, width / maps) + 0.5 if maps else 0.0)
    style: dict[Any, Any] = {
        "font.size": 8, "font.family": font_families([*explanation.names, *explanation.captions]),
        "text.parse_math": False, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.edgecolor": PALE, "axes.titlesize": 8.5, "svg.hashsalt": "llip", "svg.fonttype": "none",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.05)
        figure = Figure(figsize=(width, count * (upper + lower) + 0.5), layout=layout)
        blocks = figure.subfigures(count, 1, squeeze=False, hspace=0.03)
        for index, block in enumerate(blocks[:, 0]):
            fit = Image.Image.resize if explanation.squashed else ImageOps.fit
            square = fit(images[index], (SIDE, SIDE), Image.Resampling.BICUBIC)
            rows = block.subfigures(2, 1, height_ratios=(upper, lower)) if maps else [block]
            _draw_numbers(rows[0], explanation, index, square)
            if maps:
                _draw_maps(rows[1], explanation, index, square, shown)
        figure.text(0.005, 0.0, _footer(explanation), fontsize=7, va="top", wrap=False)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph")  # `fonts.missing_note` names them
                figure.savefig(path, dpi=160, bbox_inches="tight", facecolor="white", metadata=_no_date(path))
        except OSError as error:
            raise UserError(f"the figure {str(path)!r} cannot be written: {error}") from error


def _no_date(path: Path) -> dict[str, None]:
    """Return metadata without a date, so that equal figures are equal files."""
    return {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix, {})


def _footer(explanation: Explanation) -> str:
    source = {"last": "attention of the last block, averaged over its heads", "rollout": "attention rollout"}
    lines = list(explanation.notes)
    heads, tokens = explanation.weights.shape[2:]
    if heads * tokens > _BY_HEAD:
        lines.append(f"Weights by head are not drawn for {heads} heads x {tokens} tokens; --json prints them.")
    if explanation.how in source:
        maps = (
            f"{source[explanation.how]}, of mixture tokens over patches; a caption's map is the average of the tokens' "
            "maps under its weights"
        )
        if explanation.tokens == "patches":
            maps = "the weights of captions over patches"
        lines.append(f"Maps: {maps}.\nBrightness is the square root of the attention relative to each map's maximum.")
    return "\n".join(lines)


def _plain(axes: "Axes") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_numbers(block: "SubFigure | Figure", explanation: Explanation, index: int, square: Image.Image) -> None:
    """Draw image, scores, weights averaged over heads and weights by head, with a row per caption."""
    heads, tokens = explanation.weights.shape[2:]
    by_head = heads > 1 and heads * tokens <= _BY_HEAD
    ratios = (1.2, 1.2, 1.6, 3.2) if by_head else (1.2, 1.5, 3.0) if tokens > 1 else (1.2, 3.0)
    cells = block.subplots(1, len(ratios), gridspec_kw={"width_ratios": ratios})
    cells[0].imshow(square)
    _plain(cells[0])
    cells[0].set_title(shorten(explanation.names[index], _WRAP), fontweight="bold")
    _draw_scores(cells[1], explanation, index)
    if tokens > 1:
        _draw_weights(cells[2], explanation.mean_weights[index], f"weights over {explanation.tokens}")
    if by_head:
        _draw_head_weights(cells[3], explanation.weights[index])


def _draw_scores(axes: "Axes", explanation: Explanation, index: int) -> None:
    scores = explanation.scores
    rows = np.arange(len(explanation.captions))
    values = scores[index].numpy()
    best = (scores.argmax(dim=0) == index).numpy() & (len(scores) > 1)
    axes.barh(rows, values, height=0.62, color=[ACCENT if hit else PALE for hit in best])
    axes.axvline(0, color=INK, linewidth=0.6)
    low, high = min(0.0, scores.min().item()), max(0.0, scores.max().item())
    span = (high - low) or 1.0
    axes.set_xlim(low - 0.05 * span, high + 0.3 * span)
    for row, value in enumerate(values):
        axes.text(max(value, 0.0) + 0.02 * span, row, f"{value:.2f}", va="center", fontsize=7.5)
    axes.set_yticks(rows, [wrap(caption, _WRAP, lines=2) for caption in explanation.captions])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.set_xticks([])
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title("cosine (blue: best image)" if len(scores) > 1 else "score (cosine)")


def _draw_weights(axes: "Axes", mean: Tensor, title: str) -> None:
    """Draw weights [T, K], with the effective number of tokens at the right of each row."""
    captions, tokens = mean.shape
    axes.imshow(mean.numpy(), aspect="auto", cmap=HEAT, vmin=0, vmax=mean.max().item(), interpolation="nearest")
    axes.set_title(title)
    every = max(1, tokens // 8)
    axes.set_xticks(np.arange(0, tokens, every), [str(k) for k in range(0, tokens, every)])
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=7)
    axes.set_xlabel("token; at the right: effective number of tokens", fontsize=7)
    for row, value in enumerate(effective_tokens(mean).tolist()):
        axes.text(tokens - 0.5 + 0.03 * tokens, row, f"{value:.1f}", va="center", fontsize=7.5)
    if captions * tokens <= 128:
        strongest = mean.max().item()
        for (row, token), value in np.ndenumerate(mean.numpy()):
            ink = "white" if value > 0.6 * strongest else INK
            axes.text(token, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=ink)
        axes.set_title(f"{title}, %")


def _draw_head_weights(axes: "Axes", weights: Tensor) -> None:
    """Draw weights [T, M, K], heads side by side."""
    heads, tokens = weights.shape[1:]
    axes.imshow(weights.flatten(1).numpy(), aspect="auto", cmap=HEAT, vmin=0, interpolation="nearest")
    for head in range(1, heads):
        axes.axvline(head * tokens - 0.5, color="white", linewidth=2.5)
    axes.set_xticks((np.arange(heads) + 0.5) * tokens - 0.5, [f"head {head}" for head in range(heads)])
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=7)
    for side in ("top", "right", "bottom", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title("the same weights by head")


def _draw_maps(block: "SubFigure", explanation: Explanation, index: int, square: Image.Image, shown: int) -> None:
    """Draw a row of maps: of each caption, then of the tokens that matter most."""
    assert explanation.attention is not None
    attention = explanation.attention[index]
    chosen = tokens_that_matter(explanation.mean_weights[index], shown)
    titles = ["every caption"]
    if explanation.text_conditioned:
        titles = [wrap(caption, 20, lines=3) for caption in explanation.captions]
    captions = len(titles)
    maps = [*explanation.caption_maps(index)[:captions], *attention[chosen]]
    titles += [f"token {token}\n{100 * attention[token].sum():.0f} % on patches" for token in chosen]
    ratios = [*[1.0] * captions, 0.12, *[1.0] * shown]
    axes = list(block.subplots(1, len(ratios), gridspec_kw={"width_ratios": ratios}))
    axes.pop(captions).set_visible(False)
    for cell, values, title in zip(axes, maps, titles, strict=True):
        cell.imshow(_spotlight(square, values))
        _plain(cell)
        cell.set_title(title, fontsize=7)
    axes[0].set_ylabel("where captions look", fontsize=8)
    axes[captions].set_ylabel("where tokens look", fontsize=8)


def _spotlight(square: Image.Image, values: Tensor) -> np.ndarray:
    """Darken the image where a map [H, W] is low."""
    scaled = (values / values.max().clamp_min(1e-12)).sqrt().numpy()  # the eye sees small differences of dark tones
    light = np.asarray(Image.fromarray(np.float32(scaled)).resize(square.size, Image.Resampling.BICUBIC)).clip(0, 1)
    return np.asarray(square, np.float32) / 255 * (DARK + (1 - DARK) * light[:, :, None])
