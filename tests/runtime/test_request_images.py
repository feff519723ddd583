"""The picture that image to image starts from is what diffusers.utils.load_image makes of a file."""

from __future__ import annotations

import logging
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from diffusers.utils import load_image
from PIL import Image

import toolchain
from tests.parity import random_images
from toolchain.cli.main import cli
from toolchain.errors import RequestError, UsageError
from toolchain.runtime.request import check_images, read_image

HEIGHT, WIDTH = 20, 30
ORIENTATION = 0x0112
UPRIGHT: dict[int, Any] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: lambda a: np.rot90(a),
}
"""What each value of the tag asks a viewer to do, by the table of Exif 2.3."""


def rgb() -> Image.Image:
    return random_images(1, HEIGHT, WIDTH)[0]


def with_alpha(mode: str) -> Image.Image:
    image = rgb().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize((WIDTH, HEIGHT)))
    return image


def see_through(image: Image.Image) -> dict[str, Any]:
    """Options to save a palette with one transparent colour."""
    return {"transparency": image.getpixel((0, 0))}


def wide(dtype: Any, most: float) -> Image.Image:
    return Image.fromarray(np.linspace(0, most, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(dtype))


def moving() -> dict[str, Any]:
    return {"save_all": True, "append_images": random_images(2, HEIGHT, WIDTH, seed=1)}


PALETTE = rgb().quantize(17)
FILES: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "rgb": (rgb(), "png", {}),
    "jpeg": (rgb(), "jpg", {}),
    "grey": (rgb().convert("L"), "png", {}),
    "grey-alpha": (with_alpha("LA"), "png", {}),
    "black-and-white": (rgb().convert("1"), "png", {}),
    "palette": (PALETTE, "png", {}),
    "palette-transparent": (PALETTE, "png", see_through(PALETTE)),
    "palette-gif": (PALETTE, "gif", {}),
    "alpha": (with_alpha("RGBA"), "png", {}),
    "alpha-webp": (with_alpha("RGBA"), "webp", {"lossless": True}),
    "cmyk": (rgb().convert("CMYK"), "jpg", {}),
    "cmyk-tiff": (rgb().convert("CMYK"), "tiff", {}),
    "ycbcr": (rgb().convert("YCbCr"), "jpg", {}),
    "16-bit": (wide(np.uint16, 65535), "png", {}),
    "16-bit-dark": (wide(np.uint16, 200), "png", {}),
    "32-bit": (wide(np.int32, 70000), "tiff", {}),
    "float": (wide(np.float32, 255.0), "tiff", {}),
    "gif": (rgb().quantize(31), "gif", moving()),
    "apng": (rgb(), "png", moving()),
    "animated-webp": (rgb(), "webp", moving() | {"lossless": True}),
    "tiff-pages": (rgb(), "tiff", moving()),
}
SAID = {
    **dict.fromkeys(("gif", "apng", "animated-webp", "tiff-pages"), "the image has 3 frames; frame 1 of them is taken"),
    **dict.fromkeys(("16-bit", "32-bit"), "the image's values above 255 are cut off"),
}


def both_ways(path: Path) -> list[np.ndarray]:
    """The pixels as the command line and as Python get them."""
    with Image.open(path) as opened:
        (given,) = check_images(opened, 1)
    (named,) = check_images(str(path), 1)
    return [np.asarray(named), np.asarray(given)]


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_in_diffusers(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image, suffix, options = FILES[name]
    path = tmp_path / f"{name}.{suffix}"
    image.save(path, **options)
    expected = np.asarray(load_image(str(path)))
    assert expected.shape == (HEIGHT, WIDTH, 3)
    with caplog.at_level(logging.WARNING, logger="toolchain"):
        for pixels in both_ways(path):
            np.testing.assert_array_equal(pixels, expected)
    said = [record.getMessage() for record in caplog.records if record.name == "toolchain"]
    assert len(said) == (2 if name in SAID else 0)
    assert all(line.startswith(SAID[name]) for line in said)


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
@pytest.mark.parametrize("tag", UPRIGHT)
def test_a_photo_is_turned_upright(tag: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    path = tmp_path / f"photo.{suffix}"
    rgb().save(path, exif=exif, **{"lossless": True} if suffix == "webp" else {})
    expected = UPRIGHT[tag](np.asarray(rgb()))
    np.testing.assert_array_equal(np.asarray(load_image(str(path))), expected)
    for pixels in both_ways(path):
        np.testing.assert_array_equal(pixels, expected)
    # What load_image gave is not turned a second time.
    np.testing.assert_array_equal(np.asarray(check_images(load_image(str(path)), 1)[0]), expected)


def test_the_frame_that_the_user_chose_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "moving.png"
    rgb().save(path, **moving())
    with Image.open(path) as image:
        image.seek(2)
        (chosen,) = check_images(image, 1)
    np.testing.assert_array_equal(np.asarray(chosen), np.asarray(random_images(2, HEIGHT, WIDTH, seed=1)[1]))
    assert "frame 3 of them" in caplog.text


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "tiff"])
def test_a_damaged_file_is_told_or_read(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path = tmp_path / f"photo.{suffix}"
    rgb().save(path, **{} if suffix == "gif" else {"exif": exif})
    whole, refused = path.read_bytes(), []
    draw = random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.3 else whole)
        for _ in range(min(len(damaged), 4)):
            damaged[draw.randrange(min(len(damaged), 200))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_image(path)
        except UsageError as error:
            refused.append(error.where)
    assert len(refused) > 5
    assert set(refused) == {path}


def test_python_tells_of_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    rgb().save(path)
    path.write_bytes(path.read_bytes()[:900])
    with Image.open(path) as image, pytest.raises(RequestError, match="cannot be decoded"):
        check_images(image, 1)


@pytest.mark.parametrize(
    "image", [np.zeros((0, 0, 3), np.uint8), np.zeros((4, 0, 3), np.uint8), Image.new("RGB", (0, 3))]
)
def test_an_image_without_pixels(image: Any) -> None:
    with pytest.raises(RequestError, match="image has no pixels"):
        check_images(image, 1)


def test_an_image_is_not_fetched() -> None:
    with pytest.raises(RequestError, match="an image cannot be a URL") as error:
        check_images("https://example.org/a.png", 1)
    assert error.value.got == "https://example.org/a.png"


def test_a_palette_with_alpha_is_read_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    image = rgb().quantize(8)
    image.save(tmp_path / "palette.png", transparency=bytes(range(8)))
    read_image(tmp_path / "palette.png")
    assert not [warning for warning in recwarn if "PIL" in warning.filename]


def test_a_photo_on_its_side_is_drawn_upright(tiny_bundle: Path, tmp_path: Path) -> None:
    """Both sides draw what diffusers' own reading of the file gives; on its side it would be another picture."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    path, output = tmp_path / "photo.png", tmp_path / "out.png"
    random_images(1, 96, 64)[0].save(path, exif=exif)
    request: dict[str, Any] = {"strength": 0.5, "steps": 2, "seed": 0, "scheduler": "euler"}
    with closing(toolchain.load(tiny_bundle, warm_up=False)) as pipe, Image.open(path) as photo:
        images = [photo, load_image(str(path)), random_images(1, 96, 64)[0].rotate(90, expand=True)]
        opened, loaded, wrong = (pipe("a red circle", image=image, **request).images[0] for image in images)
    options = [text for name, value in request.items() for text in (f"--{name}", str(value))]
    result = CliRunner().invoke(
        cli, ["generate", str(tiny_bundle), "a red circle", "--image", str(path), *options, "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    assert loaded.size == (96, 64)
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(loaded))
    with Image.open(output) as drawn:
        np.testing.assert_array_equal(np.asarray(drawn), np.asarray(loaded))
    assert (np.asarray(wrong) != np.asarray(loaded)).any()
