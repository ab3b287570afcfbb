"""Tables of text: rows of cells, the first row the heading."""

from collections.abc import Sequence


def markdown_table(rows: Sequence[Sequence[str]], words: int = 2) -> str:
    """Return a Markdown table: the first `words` columns aligned left, then numbers."""
    rule = ["---"] * words + ["---:"] * (len(rows[0]) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def aligned_table(rows: Sequence[Sequence[str]], words: int = 2) -> str:
    """Return a table aligned for a screen: the first `words` columns left, then numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < words else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
