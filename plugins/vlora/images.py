"""Image files, read with Pillow as what they are: data of strangers. Headers are judged before pixels are decoded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.core.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Decoders that are tried; Pillow has others that start other programs."""

MAX_PIXELS = 1 << 26
"""64 megapixels: a large camera's picture; decoded, 200 MB."""

MAX_BYTES = 1 << 28

MAX_RATIO = 64
"""Of the sides. Encoders scale the shorter side, so that a thin strip would become longer than memory."""

_DEEP_MODES = ("I", "F")
_LARGEST = 255
_FIRST_FRAME = "MPO"
"""What phones write as JPEG: the picture, and behind it previews of it."""


def check_image(path: Path) -> tuple[int, int]:
    """Width and height of an image, from its header.

    Raises:
        InputError: as `read_image`, but for pixels that cannot be decoded.
    """
    with _opened(path) as image:
        return image.size


def read_image(path: Path) -> Image.Image:
    """The image as RGB, turned as its EXIF data say; what is transparent becomes white.

    Raises:
        InputError: there is no such file; it is no image of `FORMATS`, damaged, too large, too long, animated, or has
            more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    with _opened(path) as image:
        image.load()
        turned = ImageOps.exif_transpose(image)
        if turned.has_transparency_data:
            ground = Image.new("RGBA", turned.size, "white")
            return Image.alpha_composite(ground, turned.convert("RGBA")).convert("RGB")
        return turned.convert("RGB")


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    _check_file(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked here, and of odd metadata
            with Image.open(path, formats=FORMATS) as image:
                _check_header(path, image)
                yield image
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError("is no image", where=path, expected=", ".join(FORMATS),
                         remedy="convert it to PNG or JPEG") from None  # fmt: skip
    except Image.DecompressionBombError:
        raise _bomb(path, "more than Pillow opens") from None
    except Exception as error:  # decoders raise what they like: OSError, SyntaxError, EOFError, struct.error, ...
        raise InputError("the image cannot be decoded", where=path, found=f"{type(error).__name__}: {error}",
                         remedy="it is damaged or incomplete: save it again as PNG or JPEG") from None  # fmt: skip


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError("there is no such image", where=path, expected="an image file",
                         remedy="check the path, which starts at the recipe's folder")  # fmt: skip
    if (size := path.stat().st_size) > MAX_BYTES:
        raise InputError("the file is too large for an image", where=path, expected=f"at most {MAX_BYTES} bytes",
                         found=size, remedy="scale the image down")  # fmt: skip


def _check_header(path: Path, image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _bomb(path, f"{width} x {height}")
    if max(width, height) > MAX_RATIO * max(1, min(width, height)):
        raise InputError("the image is a thin strip", where=path, expected=f"sides of at most {MAX_RATIO} to 1",
                         found=f"{width} x {height}", remedy="cut a piece out of it")  # fmt: skip
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != _FIRST_FRAME:
        raise InputError("holds several pictures", where=path, expected="one", found=f"{frames} frames or pages",
                         remedy="save the one that is meant as PNG or JPEG")  # fmt: skip
    if image.mode.startswith(_DEEP_MODES) or _narrowed(image):
        raise InputError("the image has more than 8 bits a channel", where=path, expected="8 bits",
                         found=f"mode {image.mode}" + ", which Pillow would cut down" * _narrowed(image),
                         remedy="convert it to 8 bits, with the range of brightness that is meant")  # fmt: skip


def _narrowed(image: Image.Image) -> bool:
    """Whether Pillow would read deeper channels as 8 bits: PNG and TIFF say `RGB;16B`, PPM gives its largest value."""
    for tile in getattr(image, "tile", ()):
        found = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if ";16" in str(found[0]) or (image.format == "PPM" and max(found[1:], default=0) > _LARGEST):
            return True
    return False


def _bomb(path: Path, found: str) -> InputError:
    return InputError("the image has too many pixels: decoding it could fill the memory", where=path,
                      expected=f"at most {MAX_PIXELS} pixels", found=found,
                      remedy="scale it down; an encoder sees a few hundred pixels a side")  # fmt: skip
