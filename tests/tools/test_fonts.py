"""Fonts by what they cover, on a font made for the test; lines that fit."""

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager

from llip.tools import fonts


def write_font(path, family, characters):
    """Write a font that draws each character as a square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(point)
    pen.closePath()
    square, names = pen.glyph(), [".notdef", *(f"uni{ord(c):04X}" for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(c): f"uni{ord(c):04X}" for c in characters})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    paths = [write_font(tmp_path / "a.ttf", "Test One", "红星"), write_font(tmp_path / "b.ttf", "Test Two", "星左")]
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [*paths, str(tmp_path / "broken.ttf")])
    return paths


def test_fonts_that_cover_a_text_together(installed):
    assert fonts.covering_fonts(["a red star", "étoile, звезда"]) == ([fonts.DEFAULT], "")
    assert fonts.covering_fonts(["红星 star"]) == ([fonts.DEFAULT, installed[0]], "")
    assert fonts.covering_fonts(["红星", "左\n"]) == ([fonts.DEFAULT, *installed], "")
    assert fonts.covering_fonts(["红蓝\ufe0f"]) == ([fonts.DEFAULT, installed[0]], "蓝")
    assert fonts.font_families(["红"]) == ["DejaVu Sans", "Test One"]
    assert fonts.best_font("左星") == installed[1]
    assert fonts.best_font("star") == fonts.DEFAULT
    assert fonts.missing_note(["红"]) is None
    assert "蓝" in fonts.missing_note(["红蓝"])


def test_lines_fit_and_lose_nothing():
    assert fonts.shorten("a  red\nstar", 10) == "a red star"
    assert fonts.shorten("a red star on the left", 13) == "a red star..."
    assert fonts.shorten("红" * 10, 13) == "红" * 5 + "..."
    assert fonts.shorten("a\ud800\nb", 10) == "a? b"
    assert fonts.shorten("x" * 10**6, 10) == "x" * 7 + "..."
    assert fonts.wrap("x" * 10**6, 10, lines=2).endswith("...")
    assert fonts.wrap("a red star on the left", 10, lines=3) == "a red star\non the\nleft"
    assert fonts.wrap("红" * 12, 10, lines=3) == "红红红红红\n红红红红红\n红红"
    assert fonts.wrap("a red star on the left", 10, lines=2) == "a red star\non the..."
    assert fonts.wrap("", 10, lines=2) == ""
    cut = fonts.wrap("word " * 100, 10, lines=2).split("\n")
    assert len(cut) == 2
    assert all(len(line) <= 10 for line in cut)
    assert cut[-1].endswith("...")
