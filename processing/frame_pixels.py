"""What a decoded frame looks like on a screen: upright, square pixels, no alpha, ordinary brightness (SDR, BT.709)."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .frame_fitting import check_frame_pixels

PLAUSIBLE_ASPECTS = (1 / 16, 16)
"""Width of a pixel over its height beyond which a header counts as damaged."""
WHITE_NITS = 203.0
"""Brightness at which HDR shows a white sheet of paper (ITU-R BT.2408), and which becomes SDR's white."""
KNEE = 0.75
"""Share of SDR's white up to which HDR brightness is kept; the lights above are pressed together."""
TRANSPARENT = "its transparent parts are shown on black"
# Numbers of ITU-T H.273, which FFmpeg uses too.
_PQ, _HLG = 16, 18
_BT2020 = 9
_SDR_OF_BT2020 = (1, 6, 14, 15)
_TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
_STRIP = 2**18  # pixels whose light is computed at a time


@dataclass
class FrameDisplay:
    """How the frames of one decoder are to be shown.

    Attributes:
        decoder: says which transfer function and primaries its last frame had.
        aspect: width of a pixel over its height.
        transparent: set once a frame with transparent parts was shown (on black).
        orientation: of the last frame: its rotation, and whether to mirror it and the quarters to turn it.
    """

    decoder: Any
    aspect: float = 1.0
    transparent: bool = False
    orientation: tuple[int | None, bool, int] = (None, False, 0)

    @classmethod
    def of(cls, stream: Any, decoder: Any) -> "FrameDisplay":
        """The look of a stream before its first frame; an implausible pixel aspect counts as square."""
        aspect = float(stream.sample_aspect_ratio or 1)
        return cls(decoder, aspect if PLAUSIBLE_ASPECTS[0] <= aspect <= PLAUSIBLE_ASPECTS[1] else 1.0)


def upright_pixels(frame: Any, name: str, look: FrameDisplay) -> np.ndarray:
    """A decoded frame as uint8 `(H, W, 3)` RGB: turned and mirrored as its display matrix says, pixels made square.

    Transparent parts are shown on black, as video players do; HDR (PQ, HLG) is tone-mapped to SDR, and BT.2020
    becomes BT.709.

    Raises:
        ValueError: the frame is too large.
    """
    width = max(1, round(frame.width * look.aspect))
    check_frame_pixels(max(width, frame.width), frame.height, name)
    transfer = getattr(frame, "color_trc", look.decoder.color_trc)
    primaries = getattr(frame, "color_primaries", look.decoder.color_primaries)
    wide = transfer in (_PQ, _HLG) or (primaries == _BT2020 and transfer in _SDR_OF_BT2020)
    size = {} if width == frame.width else {"width": width, "height": frame.height, "interpolation": "BICUBIC"}

    def converted(pixel_format: str) -> np.ndarray:
        return frame.reformat(format=pixel_format, **size).to_ndarray()

    opacity = None
    if _has_alpha(frame.format.name):
        pixels = converted("rgba")
        pixels, opacity = pixels[..., :3], pixels[..., 3:]
    if wide:
        pixels = _ordinary_light(converted("rgb48le"), transfer)
    elif opacity is None:
        pixels = converted("rgb24")
    if opacity is not None:
        pixels, covered = on_black(pixels, opacity)
        look.transparent |= covered
    return np.ascontiguousarray(_oriented(pixels, frame, look))


def on_black(pixels: np.ndarray, opacity: np.ndarray) -> tuple[np.ndarray, bool]:
    """A picture uint8 `(H, W, 3)` of an opacity uint8 `(H, W, 1)` on black, and whether any of it is transparent."""
    if opacity.min() == 255:
        return np.ascontiguousarray(pixels), False
    product = pixels.astype(np.uint16) * opacity + 127
    return (product // 255).astype(np.uint8), True


def picture_to_sdr(pixels: np.ndarray, head: bytes) -> np.ndarray:
    """A photograph uint8 `(H, W, 3)`, tone-mapped if the beginning of its file (AVIF, HEIC, PNG) says it is HDR."""
    place = head.find(b"colrnclx")
    codes = head[place + 8 : place + 12] if place >= 0 else b""
    transfer = codes[3] if len(codes) == 4 else 0
    if head.startswith(b"\x89PNG") and (place := head.find(b"cICP")) >= 0 and place + 5 < len(head):
        transfer = head[place + 5]
    return _ordinary_light(pixels.astype(np.uint16) * 257, transfer) if transfer in (_PQ, _HLG) else pixels


@lru_cache
def _has_alpha(pixel_format: str) -> bool:
    import av

    return pixel_format == "pal8" or any(component.is_alpha for component in av.VideoFormat(pixel_format).components)


def _oriented(pixels: np.ndarray, frame: Any, look: FrameDisplay) -> np.ndarray:
    """Turn and mirror a picture; angles between the eight orientations count as the nearest."""
    # PyAV's side data and its frame hold each other in memory: looked at only when something changes.
    if frame.rotation != look.orientation[0]:
        look.orientation = (frame.rotation, *_orientation(frame))
    _, mirrored, quarters = look.orientation
    return np.rot90(pixels[:, ::-1] if mirrored else pixels, quarters)


def _orientation(frame: Any) -> tuple[bool, int]:
    """Whether to mirror a frame left to right first, and how many quarters to turn it then, counterclockwise."""
    try:
        matrix = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32)
    except KeyError:
        return False, 0
    except ValueError:  # side data of a kind that this PyAV does not know
        return False, round(frame.rotation / 90) % 4
    # A stored point (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = (float(value) for value in matrix[:5])
    mirrored = a * d - b * c < 0
    a, b = (-a, -b) if mirrored else (a, b)
    return mirrored, -round(np.arctan2(b - c, a + d) / (np.pi / 2)) % 4


def _ordinary_light(pixels: np.ndarray, transfer: int) -> np.ndarray:
    """BT.2020 picture uint16 `(H, W, 3)` as uint8 BT.709; the light of PQ and HLG is tone-mapped, strip by strip."""
    light_of, code_of = _light_of_code(transfer), _code_of_light(transfer)
    result = np.empty(pixels.shape, np.uint8)
    rows = max(1, _STRIP // pixels.shape[1])
    for row in range(0, len(pixels), rows):
        light = light_of[pixels[row : row + rows]]
        if transfer == _HLG:  # the display's own curve, for 1000 nits
            luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
            light *= 1000 / WHITE_NITS * np.power(luminance, 0.2)[..., None]
        light = np.maximum(light @ _TO_BT709.T, 0)
        if transfer in (_PQ, _HLG):
            # By the brightest channel, so that colours keep their hue: kept below the knee, above it ever closer to 1.
            peak = light.max(-1)
            over = np.maximum(peak - KNEE, 0)
            shown = np.minimum(peak, KNEE) + (1 - KNEE) * over / (over + 1 - KNEE)
            light *= (shown / np.maximum(peak, 1e-6))[..., None]
        place = np.sqrt(np.minimum(light, 1)) * (len(code_of) - 1) + 0.5
        result[row : row + rows] = code_of[place.astype(np.uint16)]
    return result


@lru_cache(maxsize=4)
def _light_of_code(transfer: int) -> np.ndarray:
    """Light of each 16-bit code, float32 `(65536,)`: PQ's with `WHITE_NITS` as 1, HLG's of the scene, others 0..1."""
    code = np.arange(65536) / 65535
    if transfer == _PQ:
        root = code ** (1 / 78.84375)
        ratio = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
        light = ratio ** (1 / 0.1593017578125) * 10000 / WHITE_NITS
    elif transfer == _HLG:
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    else:
        light = code**2.4
    return light.astype(np.float32)


@lru_cache(maxsize=4)
def _code_of_light(transfer: int) -> np.ndarray:
    """8-bit codes for square roots of light from 0 to 1, uint8 `(4096,)`: sRGB's for HDR, else by the same curve."""
    light = np.linspace(0, 1, 4096) ** 2
    if transfer in (_PQ, _HLG):
        code = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    else:
        code = light ** (1 / 2.4)
    return np.rint(code * 255).astype(np.uint8)
