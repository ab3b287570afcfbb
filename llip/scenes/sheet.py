"""A picture of example scenes with their captions."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from llip.errors import UserError

SIDE = 176  # pixels of one scene on the sheet
GAP = 18
CAPTIONS = 3
TEXT_SIZE = 13
LINE = 17  # pixels from one line of text to the next
INK = (40, 42, 48)


def contact_sheet(out: Path, path: Path, rows: int = 2, cols: int = 4) -> Path:
    """Write a PNG to `path` that shows the first rows x cols training scenes of the dataset in `out`; return `path`.

    Raises UserError where `out` holds no training shard, too few scenes, or `path` cannot be written.
    """
    if rows < 1 or cols < 1:
        raise UserError(f"scenes: a sheet needs at least one row and one column, got {rows} x {cols}")
    font = ImageFont.load_default(TEXT_SIZE)
    samples = [(image, _lines(captions, font)) for image, captions in _first_samples(Path(out), rows * cols)]
    cell_height = SIDE + LINE * max(len(lines) for _, lines in samples) + 2 * GAP
    sheet = Image.new("RGB", (cols * (SIDE + GAP) + GAP, rows * cell_height + GAP), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(samples):
        x, y = GAP + i % cols * (SIDE + GAP), GAP + i // cols * cell_height
        sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        for row, line in enumerate(lines):
            draw.text((x, y + SIDE + 6 + row * LINE), line, fill=INK, font=font)
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(
            f"scenes: cannot write the sheet {str(path)!r}: {error}. Give a path in an existing folder"
        ) from None
    return Path(path)


def _first_samples(out: Path, count: int) -> list[tuple[Image.Image, list[str]]]:
    """Return the first `count` training pictures and their captions."""
    samples: list[tuple[Image.Image, list[str]]] = []
    for shard in sorted(out.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is None:  # a folder
                    continue
                data = file.read()
                if member.name.endswith(".png"):
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                elif member.name.endswith(".json"):
                    samples.append((image, json.loads(data)["captions"]))
                if len(samples) == count:
                    return samples
    raise UserError(f"scenes: a sheet of {count} scenes was asked for, but {out} holds {len(samples)} training scenes.")


def _lines(captions: list[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Return the first captions as lines that fit under a scene, each caption starting with a dash."""
    lines: list[str] = []
    for caption in captions[:CAPTIONS]:
        lines.append("-")
        for word in caption.split():
            longer = f"{lines[-1]} {word}"
            if font.getlength(longer) > SIDE:
                lines.append(f"  {word}")
            else:
                lines[-1] = longer
    return lines
