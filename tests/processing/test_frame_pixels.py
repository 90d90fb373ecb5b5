"""How frames look: transparent parts, HDR, orientation, formats; right values from ffmpeg (HDR: zscale) and Pillow."""

import io
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, features

from video_ma2mba.processing.frame_pixels import TRANSPARENT, on_black
from video_ma2mba.processing.video_reader import open_video

from .conftest import numbered_picture, numbers_in

FILES = Path(__file__).parent / "files"
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128), (255, 255, 0), (40, 90, 160)]
COLOURS.append((200, 120, 60))  # of the bars in hdr_*.mp4, of which each is 8 pixels wide; paper white is 203 nits


def cut_out(hidden: tuple[int, int, int]) -> np.ndarray:
    """A yellow square, opaque; around it another colour that nobody sees. uint8 `(64, 64, 4)`."""
    picture = np.zeros((64, 64, 4), np.uint8)
    picture[..., :3] = hidden
    picture[16:48, 16:48] = (255, 255, 0, 255)
    return picture


# --------------------------------------------------------------------------------------------------------------- alpha
ALPHA = {
    "a.mov": ("qtrle", "argb"),
    "png.mov": ("png", "rgba"),
    "prores.mov": ("prores_ks", "yuva444p10le"),
    "a.mkv": ("ffv1", "bgra"),
    "a.apng": ("apng", "rgba"),
    "vp8.webm": ("libvpx", "yuva420p"),
    "vp9.webm": ("libvpx-vp9", "yuva420p"),
}


def write_alpha(path: Path, picture: np.ndarray, codec: str, pix_fmt: str) -> None:
    with av.open(str(path), "w") as container:
        vpx = {"crf": "4", "b": "4M", "auto-alt-ref": "0"}
        options = vpx if "vpx" in codec else {"profile": "4444"} if codec == "prores_ks" else {}
        stream = container.add_stream(codec, rate=5, options=options)
        stream.width, stream.height, stream.pix_fmt = picture.shape[1], picture.shape[0], pix_fmt
        if "vpx" in codec:
            stream.metadata["alpha_mode"] = "1"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgba")))
        container.mux(stream.encode())


@pytest.mark.parametrize("name", ALPHA)
def test_hidden_colours_of_videos_are_not_read(tmp_path, name):
    pictures = []
    for hidden in ((255, 0, 0), (0, 0, 255)):
        write_alpha(tmp_path / name, cut_out(hidden), *ALPHA[name])
        reader = open_video(tmp_path / name)
        pixels = reader.read().pixels[0].astype(int)
        assert reader.warnings == [TRANSPARENT]
        assert pixels[:14].max() == pixels[50:].max() == pixels[:, :14].max() == 0
        np.testing.assert_allclose(pixels[20:44, 20:44], np.broadcast_to((255, 255, 0), (24, 24, 3)), atol=8)
        pictures.append(pixels)
    if "yuva420p" not in ALPHA[name]:  # where colours are coarser than shapes, hidden ones reach over the edge
        assert np.abs(pictures[0] - pictures[1]).max() <= 2


@pytest.mark.parametrize("name", ["a.mov", "a.mkv"])
def test_opaque_videos_with_alpha_are_not_spoken_of(tmp_path, name):
    picture = cut_out((10, 20, 30))
    picture[..., 3] = 255
    write_alpha(tmp_path / name, picture, *ALPHA[name])
    reader = open_video(tmp_path / name)
    np.testing.assert_array_equal(reader.read().pixels[0], picture[..., :3])
    assert reader.warnings == []


def test_half_transparent_is_half_as_bright():
    pixels, covered = on_black(np.full((1, 3, 3), 200, np.uint8), np.array([[[0], [128], [255]]], np.uint8))
    assert covered and pixels[0, :, 0].tolist() == [0, 100, 200]


def picture_bytes(image: Image.Image, file_format: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **settings)
    return buffer.getvalue()


def test_hidden_colours_of_pictures_are_not_read():
    rgba = [Image.fromarray(cut_out(hidden)) for hidden in ((255, 0, 0), (0, 0, 255))]
    palette = [image.convert("RGB").quantize(4) for image in rgba]
    forms = {
        "pillow": rgba,
        "png": [picture_bytes(image, "PNG") for image in rgba],
        "webp": [picture_bytes(image, "WEBP", lossless=True, exact=True) for image in rgba],
        "tiff": [picture_bytes(image, "TIFF") for image in rgba],
        "palette": [picture_bytes(image, "PNG", transparency=image.getpixel((0, 0))) for image in palette],
        "grey": [picture_bytes(image.convert("LA"), "PNG") for image in rgba],
    }
    for name, (red, blue) in forms.items():
        with pytest.warns(UserWarning, match="transparent parts are shown on black"):
            first, second = open_video(red).read().pixels, open_video(blue).read().pixels
        np.testing.assert_array_equal(first, second, err_msg=name)
        assert first[0, 0, 0].tolist() == [0, 0, 0] and first[0, 32, 32, 0] > 200


# ----------------------------------------------------------------------------------------------------------------- HDR
# zscale to linear light (npl=203), BT.709 primaries, sRGB; what is as bright as paper is pressed together here.
ZSCALE = {
    "pq": [None, None, None, None, (128, 128, 128), None, (39, 90, 160), (201, 120, 61)],
    "hlg": [None, None, None, None, (111, 111, 111), None, None, (187, 102, 39)],
}


@pytest.mark.parametrize("name", ZSCALE)
def test_hdr_is_tone_mapped(name):
    pixels = open_video(FILES / f"hdr_{name}.mp4").read().pixels[0].astype(int)
    for place, (colour, expected) in enumerate(zip(COLOURS, ZSCALE[name], strict=True)):
        seen = pixels[8:24, place * 8 + 2 : place * 8 + 6].mean((0, 1))
        if expected is not None:
            np.testing.assert_allclose(seen, expected, atol=3 if name == "pq" else 15)
        else:  # as colourful as SDR shows it, nowhere cut off at the top
            assert (seen[np.array(colour) == 255] > 195).all() and (seen[np.array(colour) == 0] < 20).all()
            assert seen.max() < 250 or name == "hlg"


def test_wide_gamut_of_ordinary_brightness(tmp_path):
    """BT.2020 red at full strength lies outside of BT.709; grey stays grey."""
    planes = np.zeros((48, 80, 3), np.uint8)
    planes[:, :40], planes[:, 40:] = (128, 128, 128), (160, 100, 100)
    pixels = {}
    for primaries in (1, 9):
        path = tmp_path / f"{primaries}.mkv"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("ffv1", rate=5)
            stream.width, stream.height, stream.pix_fmt = 80, 48, "bgr0"
            stream.codec_context.color_primaries, stream.codec_context.color_trc = primaries, 1
            frame = av.VideoFrame.from_ndarray(planes, format="rgb24").reformat(format="bgr0")
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        pixels[primaries] = open_video(path).read().pixels[0].astype(int)
    np.testing.assert_array_equal(pixels[1], planes)
    np.testing.assert_allclose(pixels[9][0, 0], (128, 128, 128), atol=1)
    assert pixels[9][0, 60, 0] > 170 and pixels[9][0, 60, 1] < 100  # the same red, farther from BT.709's white


# ------------------------------------------------------------------------------------------------------------ pictures
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_of_photographs(file_format, orientation):
    picture = np.zeros((32, 48, 3), np.uint8)
    picture[:16, :16], picture[:16, 32:], picture[16:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    settings = {"lossless": True} if file_format == "WEBP" else {"quality": 95} if file_format == "JPEG" else {}
    data = picture_bytes(Image.fromarray(picture), file_format, exif=exif, **settings)
    turn = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: np.rot90(p, 2),
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
        8: lambda p: np.rot90(p),
    }[orientation]
    seen = open_video(data).read().pixels[0].astype(int)
    assert seen.shape == turn(picture).shape and np.abs(seen - turn(picture)).mean() < 8


def test_photographs_with_more_pictures_in_them(tmp_path):
    """Multi-Picture JPEG: the main picture, whichever way it is given; a folder of them is a video."""
    for number in range(4):
        large, small = (Image.fromarray(numbered_picture(number)) for _ in range(2))
        large.save(
            tmp_path / f"{number}.jpg", "MPO", save_all=True, append_images=[small.resize((20, 12))], quality=95
        )
    one = tmp_path / "3.jpg"
    assert Image.open(one).n_frames == 2
    opened = Image.open(one)
    opened.seek(1)
    for source in (one, one.read_bytes(), Image.open(one), opened, [one]):
        assert numbers_in(open_video(source).read().pixels) == [3]
    reader = open_video(tmp_path)
    assert numbers_in(reader.read().pixels) == [0, 1, 2, 3] and reader.warnings == []


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_pictures_made_of_tiles(tmp_path):
    """640x256 of two tiles, the number 1 in the left one and 2 in the right one."""
    path = FILES / "tiles.avif"
    for source in (path, path.read_bytes(), [path]):
        pixels = open_video(source).read().pixels
        assert pixels.shape == (1, 256, 640, 3)
        assert pixels[0, :, :32].mean() > 240 and pixels[0, :, 352:384].mean() > 240
        assert pixels[0, :, 40:345].max() < 60 and pixels[0, :, 392:].max() < 60
    for number in range(3):
        Image.fromarray(numbered_picture(number)).save(tmp_path / f"{number}.avif", quality=90)
    assert numbers_in(open_video(tmp_path).read().pixels) == [0, 1, 2]


def test_moving_pngs_are_videos(tmp_path):
    first, *rest = [Image.fromarray(numbered_picture(number)) for number in range(6)]
    data = picture_bytes(first, "PNG", save_all=True, append_images=rest, duration=500)
    path = tmp_path / "moving.png"
    path.write_bytes(data)
    for source in (path, data):
        reader = open_video(source, fps=2)
        assert numbers_in(reader.read().pixels) == list(range(6)) and reader.duration == pytest.approx(3, abs=0.01)


def test_sixteen_bits_of_grey():
    grey = (np.arange(48 * 80).reshape(48, 80) * 17).astype(np.uint16)
    seen = open_video(picture_bytes(Image.fromarray(grey), "PNG")).read().pixels[0]
    np.testing.assert_array_equal(seen, np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, 2))


# -------------------------------------------------------------------------------------------------------------- arrays
def test_grey_frames():
    grey = np.random.default_rng(0).integers(0, 256, (3, 6, 8), dtype=np.uint8)
    expected = np.repeat(grey[..., None], 3, 3)
    for form in (grey[..., None], grey[:, None], torch.from_numpy(grey)[..., None], torch.from_numpy(grey)[:, None]):
        np.testing.assert_array_equal(open_video(form).read().pixels, expected)
        np.testing.assert_array_equal(open_video(form / 255.0).read().pixels, expected)
    for form in (grey, torch.from_numpy(grey), grey / 255):
        with pytest.raises(ValueError, match=r"the shape \(3, 6, 8\) is one picture or three grey frames; pass"):
            open_video(form)
    for form in (grey[None], [grey], torch.from_numpy(grey)[None]):  # one picture, said so
        np.testing.assert_array_equal(open_video(form).read().pixels, grey.transpose(1, 2, 0)[None])
    with pytest.raises(ValueError, match="shape"):
        open_video(np.zeros((5, 6, 8))).read()


def test_hdr_photographs_are_tone_mapped():
    """PQ said in a PNG's cICP chunk: paper white at 0.58 of the scale comes out light, not middle grey."""
    data = picture_bytes(Image.fromarray(np.full((8, 8, 3), 148, np.uint8)), "PNG")
    chunk = b"cICP" + bytes([9, 16, 0, 1])
    chunk = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert open_video(data).read().pixels[0, 0, 0].tolist() == [148, 148, 148]
    seen = open_video(data[:33] + chunk + data[33:]).read().pixels[0, 0, 0]
    assert (seen > 230).all() and (seen < 250).all()
