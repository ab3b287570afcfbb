"""The answers to look at: a contact sheet, or a page that needs nothing but a browser."""

import base64
import html
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from PIL import Image, ImageDraw, ImageFont, ImageOps

from llip.errors import UserError
from llip.tools.search.query import Hit

SIDE, GAP, COLUMNS, LINE = 200, 16, 5, 17  # pixels; images in a row
INK, FAINT, EMPTY = (38, 50, 63), (110, 122, 134), (232, 236, 240)


def thumbnail(path: Path, side: int) -> Image.Image:
    """Return the image within `side` x `side` pixels; an empty square where it cannot be read any more."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            with Image.open(path) as image:
                image.draft("RGB", (2 * side, 2 * side))
                return ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    except Exception:  # PIL raises a dozen kinds for broken files; the file may have gone as well
        return Image.new("RGB", (side, side), EMPTY)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    text = text.encode("utf-8", "replace").decode()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"...{text}") > width:
        text = text[1:]
    return f"...{text}"


def contact_sheet(query: str, hits: Sequence[Hit], folder: Path, path: Path) -> None:
    """Write a png with the answers in rows, best first, each with its score and its name.

    Raises:
        UserError: it cannot be written.
    """
    font, title = ImageFont.load_default(13), ImageFont.load_default(18)
    rows = -(-len(hits) // COLUMNS)
    columns = min(COLUMNS, len(hits))
    cell, top = SIDE + 2 * LINE + GAP, GAP + 30
    width = max(columns * (SIDE + GAP) + GAP, 420)
    sheet = Image.new("RGB", (width, top + rows * cell + GAP), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), _shortened(query, title, width - 2 * GAP), fill=INK, font=title)
    for number, hit in enumerate(hits):
        x, y = GAP + number % COLUMNS * (SIDE + GAP), top + number // COLUMNS * cell
        image = thumbnail(hit.path, SIDE)
        sheet.paste(image, (x + (SIDE - image.width) // 2, y + (SIDE - image.height) // 2))
        draw.text((x, y + SIDE + 3), f"{number + 1}.  {hit.score:.3f}", fill=INK, font=font)
        name = _shortened(_relative(hit.path, folder), font, SIDE)
        draw.text((x, y + SIDE + 3 + LINE), name, fill=FAINT, font=font)
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(f"the sheet {str(path)!r} cannot be written: {error}") from error


def _relative(path: Path, folder: Path) -> str:
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
    """Write one file that holds its thumbnails and links to the images themselves.

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
                name=html.escape(_relative(hit.path, folder)),
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
