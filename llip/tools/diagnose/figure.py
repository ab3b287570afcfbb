"""The report as a figure: usage, tokens per pair, variances of the image feature, spectra."""

from pathlib import Path
from typing import Any

from llip.tools.fonts import font_families

INK, BLUE, GRAY, ORANGE = "#26323f", "#1f6fb4", "#c3ccd6", "#d98324"


def draw(report: dict[str, Any], title: str, path: Path) -> None:
    """Write a png."""
    import matplotlib  # slow to import
    from matplotlib.figure import Figure

    tokens = len(report["usage"])
    style: dict[Any, Any] = {"font.size": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
             "text.color": INK, "axes.edgecolor": GRAY, "text.parse_math": False,
             "font.family": font_families([title])}  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(15, 3.3), layout="constrained")
        axes = figure.subplots(1, 4, width_ratios=(1.3, 1, 1, 1.2))
        axes[0].bar(range(tokens), [100 * value for value in report["usage"]], color=BLUE)
        axes[0].axhline(100 / tokens, color=INK, linewidth=0.8, linestyle=":", label="even use")
        axes[0].set(
            title=f"use of each token, % (effective number {report['usage_effective']:.1f})", xlabel="mixture token"
        )
        axes[0].legend(frameon=False)
        axes[1].hist(report["pair_effective_numbers"], bins=30, range=(1, max(tokens, 2)), color=BLUE)
        axes[1].set(title="tokens mixed by one head for one pair", xlabel="effective number, 1 to K", yticks=[])
        names = ("over captions\ntrue of an image", "over all\ncaptions", "over images")
        keys = ("z_variance_over_own_texts", "z_variance_over_texts", "z_variance_over_images")
        bars = axes[2].bar(names, [report[key] for key in keys], color=[BLUE, BLUE, GRAY])
        axes[2].bar_label(bars, fmt="%.3f", padding=2)
        axes[2].margins(y=0.12)
        axes[2].set(title="variance of the image feature z")
        for key, label, color in (("singular_values", "image features, own captions", BLUE),
                                  ("text_singular_values", "text features", ORANGE)):  # fmt: skip
            values = [value for value in report[key] if value > 1e-6]
            axes[3].plot(range(1, len(values) + 1), values, label=label, color=color)
        axes[3].set(title="singular values of centred features", xlabel="index", yscale="log")
        axes[3].legend(frameon=False)
        lines = [title, *(f"ALARM: {alarm}" for alarm in report["alarms"])]
        figure.suptitle("\n".join(lines), fontsize=9, color=INK if len(lines) == 1 else "#b3261e")
        figure.savefig(path, dpi=130, facecolor="white")
