"""Pixels of training images against PIL's, unusual and damaged files, and how crops are drawn."""

import io
import math
import random
import struct
import warnings
import zlib

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin
from torchvision.transforms.v2 import RandomResizedCrop

from llip.data import images
from llip.data.captions import BadSample
from llip.data.images import CropBox, ImageReader, crop_box, decode_image, resize_crop

SCALE = (0.9, 1.0)


def photo(seed=0, width=128, height=96):
    """A PIL image with detail at all scales, as photographs have: smooth noise, coarse and fine, mostly grey."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cell in (2, 4, 8, 16, 32, 64):
        grid = (max(2, height // cell), max(2, width // cell))
        noise = rng.normal(size=(*grid, 1)) + 0.4 * rng.normal(size=(*grid, 3))
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel].astype(np.float32)).resize((width, height), Image.BICUBIC)
            pixels[..., channel] += np.asarray(layer) * math.sqrt(cell)
    pixels = 120 + 50 * pixels / pixels.std()
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pil_pixels(data):
    """The reference: [H, W, 3]."""
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def pil_crop(data, box, size):
    """The reference of the whole path: [S, S, 3]."""
    image = Image.fromarray(pil_pixels(data))
    image = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
    return np.asarray(image.resize((size, size), Image.BICUBIC))


def rows(image):
    return image.permute(1, 2, 0).numpy()


def difference(image, reference):
    return np.abs(rows(image).astype(int) - reference.astype(int))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [64, 224, 512])  # far down, as in training, up
def test_photographs_have_the_pixels_of_pil(size, subsampling):
    reader = ImageReader(size, SCALE)
    for seed in range(3):
        data = encode(photo(seed, 512, 384), quality=88, subsampling=subsampling)
        box = crop_box(384, 512, random.Random(seed), SCALE)
        image = reader.read(data, random.Random(seed))
        assert image.shape == (3, size, size)
        assert image.dtype == torch.uint8
        off = difference(image, pil_crop(data, box, size))
        assert off.mean() < 0.1  # grey levels; the project asks for 1
        assert off.max() <= 3


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [(384, 512), (301, 96), (64, 64), (40, 33), (1, 90)])  # H, W
def test_the_center_crop_has_the_pixels_of_the_evaluation_transform(shape, mode):
    height, width = shape
    data = encode(photo(1, 512, 384).resize((width, height)), "PNG")
    transform = open_clip.image_transform(64, is_train=False, resize_mode=mode, mean=(0, 0, 0), std=(1, 1, 1))
    expected = 255 * transform(Image.fromarray(pil_pixels(data))).permute(1, 2, 0).numpy()
    image = ImageReader(64, None, resize_mode=mode).read(data, random.Random(0))
    off = difference(image, expected.round())
    assert off.mean() < 0.3  # grey levels: two rounded passes, as for `test_odd_shapes`
    assert off.max() <= 2


def test_a_picture_too_narrow_for_the_center_crop_is_dropped():
    with pytest.raises(BadSample, match="too many pixels"):
        ImageReader(224, None).read(encode(Image.new("RGB", (4000, 1)), "PNG"), random.Random(0))


def test_a_crop_depends_on_the_pixels_inside_only():
    box = CropBox(7, 11, 40, 50)
    image = decode_image(encode(photo()))
    other = torch.zeros_like(image)
    inside = (slice(None), slice(box.top, box.top + box.height), slice(box.left, box.left + box.width))
    other[inside] = image[inside]
    assert torch.equal(resize_crop(image, box, 24), resize_crop(other, box, 24))
    assert not torch.equal(resize_crop(image, box, 24), resize_crop(image, CropBox(0, 0, 96, 128), 24))


def test_the_layout_in_memory_does_not_matter():
    image, box = decode_image(encode(photo())), CropBox(3, 4, 60, 70)
    assert difference(resize_crop(image.contiguous(), box, 32), rows(resize_crop(image, box, 32))).max() == 0


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 300), (300, 1), (2, 3), (2000, 7), (64, 64)],  # H, W
)
def test_odd_shapes(shape):
    height, width = shape
    data = encode(photo(3, 512, 384).resize((width, height)))
    assert (rows(decode_image(data)) == pil_pixels(data)).all()
    box = crop_box(height, width, random.Random(0), SCALE)
    off = difference(ImageReader(64, SCALE).read(data, random.Random(0)), pil_crop(data, box, 64))
    assert off.max() <= 2


def png_16_bit():
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    return encode(Image.fromarray(ramp), "PNG")


def with_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return encode(photo(), exif=exif)


def animation(form):
    frames = [photo(seed) for seed in range(3)]
    return encode(frames[0], form, save_all=True, append_images=frames[1:], duration=50)


def palette():
    return photo().quantize(64)


UNUSUAL = {
    "jpeg": lambda: encode(photo()),
    "odd size": lambda: encode(photo(0, 61, 45)),
    "best quality": lambda: encode(photo(), quality=100, subsampling=0),
    "grey jpeg": lambda: encode(photo().convert("L")),
    "progressive": lambda: encode(photo(), progressive=True),
    "restart markers": lambda: encode(photo(), restart_marker_rows=1),
    "rgb jpeg": lambda: encode(photo(), keep_rgb=True),
    "cmyk": lambda: encode(photo().convert("CMYK")),
    "ycc tagged adobe": lambda: with_adobe_marker(encode(photo()), 1),
    "rgb tagged adobe": lambda: with_adobe_marker(encode(photo()), 0),
    "exif orientation": with_exif_orientation,
    "colour profile": lambda: encode(photo(), icc_profile=ImageCms.ImageCmsProfile(srgb()).tobytes()),
    "junk behind": lambda: encode(photo()) + bytes(500) + b"junk",
    "multi-picture": lambda: animation("MPO"),
    "png": lambda: encode(photo(), "PNG"),
    "grey png": lambda: encode(photo().convert("L"), "PNG"),
    "1 bit png": lambda: encode(photo().convert("1"), "PNG"),
    "palette": lambda: encode(palette(), "PNG"),
    "palette, one transparent": lambda: encode(palette(), "PNG", transparency=3),
    "palette, transparencies": lambda: encode(palette(), "PNG", transparency=bytes(range(0, 256, 4))),
    "grey and alpha": lambda: encode(photo().convert("LA"), "PNG"),
    "alpha": lambda: encode(with_alpha(), "PNG"),
    "animated png": lambda: animation("PNG"),
    "webp": lambda: encode(photo(), "WEBP"),
    "webp, alpha": lambda: encode(with_alpha(), "WEBP"),
    "animated webp": lambda: animation("WEBP"),
    "gif": lambda: animation("GIF"),
    "bmp": lambda: encode(photo(), "BMP"),
    "tiff": lambda: encode(photo().convert("CMYK"), "TIFF"),
}


def test_grey_of_16_bits_is_scaled_where_pil_would_cut_it_off():
    data = png_16_bit()
    deep = np.asarray(Image.open(io.BytesIO(data))).astype(np.int64)
    assert deep.max() > 255, "the picture would not show the difference"
    found = decode_image(data)  # [3, H, W]
    assert (found.numpy() == deep // 257).all()


def srgb():
    return ImageCms.createProfile("sRGB")


def with_alpha():
    image = photo()
    image.putalpha(photo(1).convert("L"))
    return image


def with_adobe_marker(data, transform):
    """Put Adobe's APP14 behind the first marker; `transform` says YCbCr (1) or RGB (0)."""
    assert data[2:4] == b"\xff\xe0"  # JFIF, which decides before Adobe does: take it out
    rest = data[4 + struct.unpack(">H", data[4:6])[0] :]
    return data[:2] + b"\xff\xee\x00\x0eAdobe" + struct.pack(">HHHB", 100, 0, 0, transform) + rest


@pytest.mark.parametrize("case", UNUSUAL)
def test_unusual_files_are_read_as_by_pil(case, capfd):
    data = UNUSUAL[case]()
    reference = pil_pixels(data)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode_image(data)
    assert rows(image).shape == reference.shape
    assert (rows(image) == reference).all()
    assert capfd.readouterr().err == ""


def test_what_the_cases_are_meant_to_show():
    assert decode_image(UNUSUAL["exif orientation"]()).shape == (3, 96, 128)  # not turned
    first = rows(decode_image(UNUSUAL["animated webp"]())).astype(int)
    assert np.abs(first - np.asarray(photo(0))).mean() < np.abs(first - np.asarray(photo(1))).mean() / 4
    plain, tagged = (decode_image(UNUSUAL[case]()).float().mean((1, 2)) for case in ("jpeg", "rgb tagged adobe"))
    assert (plain - tagged).abs().max() > 5  # Adobe's marker changes the colours, and is heeded
    transparent = Image.new("RGBA", (4, 4), (10, 200, 30, 0))
    assert decode_image(encode(transparent, "PNG")).amax((1, 2)).tolist() == [10, 200, 30]  # alpha is dropped


def png_header(width, height):
    """A PNG that ends where its pixels should begin."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"IDAT" + bytes(8)
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return head + struct.pack(">I", 8) + start


def claim_size(data, width, height, marker):
    """Write another size into a JPEG's frame header."""
    at = data.index(b"\xff" + marker)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def half(data):
    return data[: len(data) // 2]


DAMAGED = {
    "no bytes": (lambda: b"", images.EMPTY),
    "text": (lambda: b"<html>404 not found</html>", images.NOT_AN_IMAGE),
    "zeros": (lambda: bytes(1000), images.NOT_AN_IMAGE),
    "vector graphics": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", images.NOT_AN_IMAGE),
    "postscript": (lambda: encode(photo(), "EPS"), images.NOT_AN_IMAGE),
    "two bytes of a jpeg": (lambda: encode(photo())[:2], images.NOT_AN_IMAGE),
    "a jpeg's first marker": (lambda: encode(photo())[:30], images.TRUNCATED),
    "half a jpeg": (lambda: half(encode(photo())), images.TRUNCATED),
    "half a grey jpeg": (lambda: half(encode(photo().convert("L"))), images.TRUNCATED),
    "half a cmyk jpeg": (lambda: half(encode(photo().convert("CMYK"))), images.TRUNCATED),
    "half a progressive jpeg": (lambda: half(encode(photo(), progressive=True)), images.TRUNCATED),
    "a jpeg without its last bytes": (lambda: encode(photo())[:-12], images.TRUNCATED),
    "half a png": (lambda: half(encode(photo(), "PNG")), images.TRUNCATED),
    "half a webp": (lambda: half(encode(photo(), "WEBP")), images.DAMAGED),
    "half a gif": (lambda: half(encode(photo(), "GIF")), images.TRUNCATED),
    "jpeg tables overwritten": (lambda: overwrite(encode(photo()), 180, 400), images.DAMAGED),
    "png bomb": (lambda: png_header(10_000, 10_000), images.TOO_LARGE),
    "png that PIL itself refuses": (lambda: png_header(60_000, 60_000), images.TOO_LARGE),
    "jpeg bomb": (lambda: claim_size(encode(photo()), 65_500, 65_500, b"\xc0"), images.TOO_LARGE),
    "progressive jpeg bomb": (
        lambda: claim_size(encode(photo(), progressive=True), 65_500, 1_400, b"\xc2"),
        images.TOO_LARGE,
    ),
    "cmyk jpeg bomb": (
        lambda: claim_size(encode(photo().convert("CMYK")), 10_000, 10_000, b"\xc0"),
        images.TOO_LARGE,
    ),
}


def overwrite(data, start, end):
    return data[:start] + b"\xaa" * (end - start) + data[end:]


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case, capfd):
    make, reason = DAMAGED[case]
    data = make()
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for read in (decode_image, lambda data: ImageReader(32, SCALE).read(data, random.Random(0))):
            with pytest.raises(BadSample) as caught:
                read(data)
            assert caught.value.reason == reason
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_the_limit_of_pixels_is_exact(form):
    data = encode(photo(0, 40, 30), form)
    assert decode_image(data, max_pixels=1200).shape == (3, 30, 40)
    for read in (
        lambda: decode_image(data, max_pixels=1199),
        lambda: ImageReader(32, SCALE, max_pixels=1199).read(data, random.Random(0)),
    ):
        with pytest.raises(BadSample, match=images.TOO_LARGE):
            read()


def test_every_cut_of_a_jpeg_is_noticed():
    data = encode(photo(0, 64, 48))
    for end in [*range(1, len(data) - 2, 23), len(data) - 2, len(data) - 1]:
        with pytest.raises(BadSample):
            decode_image(data[:end])


def test_corrupt_jpegs_are_judged_as_by_pil(capfd):
    data = encode(photo(0, 64, 48))
    rng = random.Random(0)
    outcomes = set()
    for _ in range(250):
        bad = bytearray(data)
        for _ in range(rng.randrange(1, 5)):
            bad[rng.randrange(2, len(bad))] = rng.randrange(256)
        try:
            reference = pil_pixels(bytes(bad))
        except Exception:
            with pytest.raises(BadSample):
                decode_image(bytes(bad))
            outcomes.add("dropped")
        else:
            assert (rows(decode_image(bytes(bad))) == reference).all()
            outcomes.add("used")
    assert outcomes == {"dropped", "used"}
    assert capfd.readouterr().err == ""  # libjpeg's warnings, above all


def test_metadata_that_unpacks_to_much_is_refused():
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 3_000_000, zip=True)
    with pytest.raises(BadSample, match=images.DAMAGED):
        decode_image(encode(photo(), "PNG", pnginfo=info))


def test_the_seed_alone_decides_and_nothing_global_moves():
    reader, data = ImageReader(32, (0.3, 1.0)), encode(photo())
    first = reader.read(data, random.Random(7))
    random.seed(1), torch.manual_seed(1)
    before = random.getstate(), torch.get_rng_state()
    assert torch.equal(reader.read(data, random.Random(7)), first)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert not torch.equal(reader.read(data, random.Random(8)), first)


def test_reading_on_does_not_change_what_was_read(monkeypatch):
    files = [encode(photo(seed, 128 - 9 * seed, 96)) for seed in range(4)] + [encode(photo(5), "PNG")]
    whole = ImageReader(96, (1.0, 1.0))  # of a square picture the crop is the picture: nothing is left to copy
    square = [encode(photo(seed, 96, 96), form) for seed in range(2) for form in ("JPEG", "PNG")]
    reader = ImageReader(32, SCALE)
    read = [reader.read(data, random.Random(i)) for i, data in enumerate(files)]
    read += [whole.read(data, random.Random(0)) for data in square]
    monkeypatch.setattr(images, "_SCRATCH_BYTES", 0)  # nothing is kept
    again = [ImageReader(32, SCALE).read(data, random.Random(i)) for i, data in enumerate(files)]
    again += [ImageReader(96, (1.0, 1.0)).read(data, random.Random(0)) for data in square]
    assert all(torch.equal(a, b) for a, b in zip(read, again, strict=True))


def gap(ours, theirs):
    """The Kolmogorov-Smirnov distance of two samples: the largest gap between their distribution functions."""
    points = np.sort(np.concatenate([ours, theirs]))
    shares = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (ours, theirs)]
    return np.abs(shares[0] - shares[1]).max()


@pytest.mark.parametrize("scale", [SCALE, (0.08, 1.0)])
@pytest.mark.parametrize("shape", [(384, 512), (700, 300)])
def test_boxes_are_distributed_as_torchvisions(shape, scale):
    height, width = shape
    draws = 3000
    rng = random.Random(0)
    ours = np.array([crop_box(height, width, rng, scale) for _ in range(draws)], float)
    torch.manual_seed(0)
    theirs_crop = RandomResizedCrop(224, scale=scale)
    picture = torch.empty(3, height, width)
    made = [theirs_crop.make_params([picture]) for _ in range(draws)]
    theirs = np.array([[m["top"], m["left"], m["height"], m["width"]] for m in made], float)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    bound = 1.95 * math.sqrt(2 / draws)  # passed by one in a thousand pairs of equally distributed samples
    for measure in (
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 3] / box[:, 2],
        lambda box: box[:, 0] / np.maximum(1, height - box[:, 2]),
    ):
        assert gap(measure(ours), measure(theirs)) < bound


@pytest.mark.parametrize("shape", [(10, 1000), (1000, 10), (1, 1), (3, 50), (101, 7)])
def test_pictures_too_narrow_for_a_draw_get_the_middle(shape):
    theirs = RandomResizedCrop(8, scale=SCALE).make_params([torch.empty(3, *shape)])
    expected = CropBox(theirs["top"], theirs["left"], theirs["height"], theirs["width"])
    assert all(crop_box(*shape, random.Random(seed), SCALE) == expected for seed in range(20))
