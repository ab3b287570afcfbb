"""Installed fonts that cover a text, and text in lines of a given width.

A character's display width is 2 columns for wide ones (Chinese, Japanese, Korean) and 1 for others.
"""

import functools
import unicodedata
from collections.abc import Iterable

from matplotlib import font_manager, ft2font

DEFAULT = str(font_manager.findfont("DejaVu Sans"))
"""Path of the font that ships with matplotlib: Latin, Greek, Cyrillic, Arabic, symbols."""


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """Return the code points of a font; none if it cannot be read, as colour bitmaps cannot."""
    try:
        return frozenset(ft2font.FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):
        return frozenset()


def _needed(texts: Iterable[str]) -> set[int]:
    """Return the code points that need a glyph."""
    return {
        ord(c) for text in texts for c in text if unicodedata.category(c)[0] not in "CZ" and c not in "\ufe0e\ufe0f"
    }


def covering_fonts(texts: Iterable[str]) -> tuple[list[str], str]:
    """Return paths of fonts that cover the texts together, `DEFAULT` first, and the characters that none has."""
    missing = _needed(texts) - _characters(DEFAULT)
    fonts = [DEFAULT]
    installed = sorted(map(str, font_manager.findSystemFonts())) if missing else []
    while missing and installed:
        best = max(installed, key=lambda path: len(missing & _characters(path)))
        if not missing & _characters(best):
            break
        fonts.append(best)
        missing -= _characters(best)
    return fonts, "".join(sorted(map(chr, missing)))


def font_families(texts: Iterable[str]) -> list[str]:
    """Return the families of `covering_fonts`, as `font.family`: a character takes the first that has it."""
    fonts = covering_fonts(texts)[0]
    for path in fonts[1:]:
        font_manager.fontManager.addfont(path)
    return [font_manager.get_font(path).family_name for path in fonts]


def best_font(text: str) -> str:
    """Return the path of the font that covers most of a text, for PIL, which draws a line with one font."""
    needed = _needed([text])
    return max(covering_fonts([text])[0], key=lambda path: len(needed & _characters(path)))


def missing_note(texts: Iterable[str]) -> str | None:
    """Return a sentence about the characters that no installed font has; None if there are none."""
    missing = covering_fonts(texts)[1]
    if not missing:
        return None
    shown = missing[:20] + ("..." if len(missing) > 20 else "")
    return f"no installed font has {shown}, drawn as boxes. Install one, for instance fonts-noto-cjk"


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def one_line(text: str) -> str:
    """Return a text that can be drawn: one space for any white space, "?" for what is no character."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def shorten(text: str, columns: int) -> str:
    """Return a text on one line, its end replaced by "..." where it is wider than `columns`."""
    text = one_line(text)
    if _columns(text) <= columns:
        return text
    text = text[:columns]  # a text may be of any length
    while _columns(text) > columns - 3:
        text = text[:-1]
    return text.rstrip() + "..."


def wrap(text: str, columns: int, lines: int) -> str:
    """Return a text on up to `lines` lines of `columns`, broken at spaces where possible; "..." ends a cut text."""
    rows = [""]
    for word in one_line(text)[: 8 * columns * lines].split():
        if rows[-1] and _columns(rows[-1]) + 1 + _columns(word) > columns:
            rows.append("")
        elif rows[-1]:
            rows[-1] += " "
        for character in word:  # of a word wider than the line, as in languages without spaces
            if _columns(rows[-1] + character) > columns:
                rows.append("")
            rows[-1] += character
    if len(rows) > lines:
        rows[lines - 1 :] = [shorten(f"{rows[lines - 1]} {rows[lines]}", columns)]
        rows[-1] = rows[-1] if rows[-1].endswith("...") else rows[-1] + "..."
    return "\n".join(rows)
