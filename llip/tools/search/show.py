"""Images of an answer as a contact sheet, or as a self-contained web page."""

import base64
import html
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont

from llip.errors import UserError
from llip.open_clip.pixels import to_rgb
from llip.tools.fonts import best_font, one_line, shorten
from llip.tools.search.query import Hit

SIDE, GAP, COLUMNS, LINE = 200, 16, 5, 17  # pixels; images in a row
INK, FAINT, EMPTY = (38, 50, 63), (110, 122, 134), (232, 236, 240)


def thumbnail(path: Path, side: int) -> Image.Image:
    """Return the image within `side` x `side` pixels; a square with the reason if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            with Image.open(path) as image:
                image.draft("RGB", (2 * side, 2 * side))
                scale = side / max(image.size)
                width, height = (max(1, round(scale * length)) for length in image.size)  # a thin image keeps a pixel
                return to_rgb(image).resize((width, height), Image.Resampling.BICUBIC)
    except Exception:  # PIL raises many kinds for damaged files; the file may be deleted
        square = Image.new("RGB", (side, side), EMPTY)
        reason = "cannot be read" if path.is_file() else "no longer there"
        ImageDraw.Draw(square).text((side / 2, side / 2), reason, FAINT, _font(reason, 13), anchor="mm")
        return square


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(best_font(text), size)


def _ending(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return a name, or the end of it that fits `width` pixels."""
    text = one_line(text)
    if font.getlength(text) <= width:
        return text
    text = text[-width:]  # a character takes a pixel at least
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"


def contact_sheet(query: str, hits: Sequence[Hit], folder: Path, path: Path) -> None:
    """Write a png with the images in rows, best first, each with its score and name.

    Raises:
        UserError: it cannot be written.
    """
    rows = -(-len(hits) // COLUMNS)
    columns = min(COLUMNS, len(hits))
    cell, top = SIDE + 2 * LINE + GAP, GAP + 30
    width = max(columns * (SIDE + GAP) + GAP, 420)
    sheet = Image.new("RGB", (width, top + rows * cell + GAP), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), shorten(query, (width - 2 * GAP) // 10), INK, _font(query, 16))
    for number, hit in enumerate(hits):
        x, y = GAP + number % COLUMNS * (SIDE + GAP), top + number // COLUMNS * cell
        image = thumbnail(hit.path, SIDE)
        sheet.paste(image, (x + (SIDE - image.width) // 2, y + (SIDE - image.height) // 2))
        score, name = f"{number + 1}.  {hit.score:.3f}", relative(hit.path, folder)
        draw.text((x, y + SIDE + 3), score, INK, _font(score, 12))
        font = _font(name, 12)
        draw.text((x, y + SIDE + 3 + LINE), _ending(name, font, SIDE), FAINT, font)
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(f"the sheet {str(path)!r} cannot be written: {error}") from error


def relative(path: Path, folder: Path) -> str:
    """Return the name of an image: its path in the folder."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{query}</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; color: #26323f; margin: 2em; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(210px, 1fr)); gap: 18px; }}
figure {{ margin: 0; }}
img {{ width: 100%; height: 200px; object-fit: contain; background: #e8ecf0; }}
figcaption span {{ color: #6e7a86; overflow-wrap: anywhere; }}
</style></head><body><h1>{query}</h1><main>
{figures}
</main></body></html>
"""
_FIGURE = (
    '<figure><a href="{link}"><img alt="{name}" src="data:image/jpeg;base64,{data}"></a>'
    "<figcaption>{number}. {score:.3f}<br><span>{name}</span></figcaption></figure>"
)


def html_page(query: str, hits: Sequence[Hit], folder: Path, path: Path) -> None:
    """Write one file with thumbnails inside and links to the images.

    Raises:
        UserError: it cannot be written.
    """
    figures = []
    for number, hit in enumerate(hits, 1):
        buffer = io.BytesIO()
        thumbnail(hit.path, 2 * SIDE).save(buffer, "JPEG", quality=85)
        figures.append(
            _FIGURE.format(
                link=html.escape("file://" + quote(str(hit.path).encode("utf-8", "surrogateescape"))),
                name=html.escape(relative(hit.path, folder)),
                data=base64.b64encode(buffer.getvalue()).decode(),
                number=number,
                score=hit.score,
            )
        )
    page = _PAGE.format(query=html.escape(query), figures="\n".join(figures))
    try:
        path.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"the page {str(path)!r} cannot be written: {error}") from error
