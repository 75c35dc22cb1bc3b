"""Images and encoders: what is seen, and what is refused in clear words."""

import struct
import zlib

import pytest
import torch
from PIL import Image

from regraft.core.errors import InputError, RegraftError, Unsupported
from regraft.plugins.vlora.images import MAX_PIXELS, check_image, read_image
from regraft.plugins.vlora.vision import open_tower
from tests.families import save_tiny
from tests.plugins.vlora.encoders import picture, save_encoder
from tests.plugins.vlora.generators import edit_json


@pytest.mark.parametrize("kind", ["clip", "clip-vision", "siglip", "siglip-vision", "prefixed"])
def test_features_are_a_hidden_state_of_the_patches(kind, tmp_path):
    prefixed = kind == "prefixed"
    vision = save_encoder("clip-vision" if prefixed else kind, tmp_path / "v", prefixed=prefixed)
    image = picture(tmp_path / "a.png")
    tower = open_tower(str(tmp_path / "v"))
    assert (tower.patches, tower.width, tower.num_layers) == (4, 12, 2)
    encoder = tower.load()
    pixels = encoder.processor([read_image(image)], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 8, 8)
    with torch.no_grad():
        states = vision(pixels, output_hidden_states=True).hidden_states
    patches = states[-2][0, tower.leading :]
    assert torch.equal(encoder(image), patches)
    last = open_tower(str(tmp_path / "v"), select_layer=-1).load()(image)
    assert torch.equal(last, states[-1][0, tower.leading :])
    assert not torch.equal(last, patches)


def test_an_image_is_turned_as_its_camera_says(tmp_path):
    upright = Image.new("RGB", (4, 2), "red")
    upright.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright.save(tmp_path / "a.png", exif=exif)
    turned = read_image(tmp_path / "a.png")
    assert turned.size == (2, 4)
    assert turned.getpixel((1, 0)) == (0, 0, 255)


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (2, 2), 7).save(tmp_path / "b.png", transparency=7)
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)
    assert read_image(tmp_path / "b.png").getpixel((0, 0)) == (255, 255, 255)


def png_header(width, height, depth=8):
    """A PNG of these sides that has no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def animated(path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])


def cut_off(path):
    picture(path, size=(64, 64), format="PNG")
    path.write_bytes(path.read_bytes()[:2000])


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"

BAD = {
    "nothing": (lambda path: None, "no such image"),
    "a folder": (lambda path: path.mkdir(), "no such image"),
    "empty": (lambda path: path.write_bytes(b""), "is no image"),
    "text": (lambda path: path.write_text("a cat"), "is no image"),
    "another format": (lambda path: path.write_bytes(POSTSCRIPT), "is no image"),
    "a bomb": (lambda path: path.write_bytes(png_header(9000, 9000)), "too many pixels"),
    "a bomb for Pillow": (lambda path: path.write_bytes(png_header(60000, 60000)), "too many pixels"),
    "a strip": (lambda path: path.write_bytes(png_header(100000, 1)), "thin strip"),
    "animated": (animated, "several pictures"),
    "sixteen bits": (lambda path: Image.new("I;16", (4, 4)).save(path, format="PNG"), "more than 8 bits"),
    "sixteen bits of colour": (lambda path: path.write_bytes(png_header(8, 8, depth=16)), "more than 8 bits"),
    "sixteen bits of PPM": (lambda path: path.write_bytes(b"P6\n8 8\n65535\n" + bytes(8 * 8 * 6)), "more than 8 bits"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_image_is_refused_by_its_header(fault, tmp_path):
    path = tmp_path / "a.png"
    make, message = BAD[fault]
    make(path)
    with pytest.raises(InputError, match=message) as caught:
        check_image(path)
    assert caught.value.remedy
    assert str(path) in str(caught.value)


def test_a_cut_off_image_is_refused_when_it_is_decoded(tmp_path):
    cut_off(tmp_path / "a.png")
    assert check_image(tmp_path / "a.png") == (64, 64)
    with pytest.raises(InputError, match="cannot be decoded"):
        read_image(tmp_path / "a.png")
    assert MAX_PIXELS < Image.MAX_IMAGE_PIXELS


def without_processor(folder):
    (folder / "preprocessor_config.json").unlink()


def wrong_pixels(folder):
    edit_json(folder / "preprocessor_config.json", crop_size={"height": 12, "width": 12})


def config_with(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


ENCODERS = {
    "no processor": (without_processor, InputError, "no image processor"),
    "pixels of another size": (wrong_pixels, InputError, "does not fit the encoder"),
    "another kind": (config_with(model_type="vit"), Unsupported, "no vision encoder"),
    "another config": (config_with(hidden_size=16), InputError, "do not fit"),
    "no number": (config_with(image_size="x"), InputError, "does not build"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ENCODERS)
def test_a_bad_encoder_is_refused(fault, tmp_path):
    save_encoder("clip-vision", tmp_path / "v")
    damage, kind, message = ENCODERS[fault]
    damage(tmp_path / "v")
    with pytest.raises(kind, match=message):
        open_tower(str(tmp_path / "v")).load()(picture(tmp_path / "a.png"))


def test_a_hidden_state_or_a_tower_that_is_not_there(tmp_path):
    save_encoder("clip-vision", tmp_path / "v")
    with pytest.raises(InputError, match="no such hidden state"):
        open_tower(str(tmp_path / "v"), select_layer=-4)
    base = save_tiny("llama", tmp_path / "base")
    edit_json(base / "config.json", model_type="clip")
    with pytest.raises(RegraftError, match="no vision tower"):
        open_tower(str(base))
