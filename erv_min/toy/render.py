"""Draws and voices one clip of the small world, and encodes it as a real MP4 (H.264 video, AAC sound) through PyAV.

A face (mouth, brows, eyes, nose; hair, shirt, room, glasses) is drawn with numpy alone: signed distances turned into
soft masks, all frames at once. A voice is a sum of harmonics with syllables, glide, tremolo and roughness. Parameters
are relative: 0 is a face or voice at rest, +-1 (or 0..1) the strongest expression. Left out: mouth movement in step
with the voice, head turns, words.
"""

import io
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

SIZE, FRAMES, FPS, RATE = 64, 8, 8, 16_000  # pixels, frames, frames a second, samples a second
FACE = ("mouth_curve", "mouth_open", "brow_slant", "brow_height", "eye_open", "lip_skew", "tremble")
VOICE = ("pitch", "tempo", "tremolo", "loudness", "glide", "roughness")
ONE_SIDED = frozenset({"mouth_open", "lip_skew", "tremble", "tremolo", "roughness"})  # 0..1, the others -1..1

SHIRTS = {"red": (200, 40, 40), "blue": (45, 70, 200), "green": (40, 150, 60), "white": (235, 235, 235),
          "black": (30, 30, 35)}
HAIRS = {"dark": (45, 30, 25), "fair": (215, 180, 95), "gray": (150, 150, 155)}
SKINS = ((255, 219, 190), (236, 188, 150), (198, 145, 105), (150, 102, 72))
ROOMS = ("kitchen", "office", "garden", "street")


@dataclass(frozen=True)
class Look:
    """What a clip shows besides the emotion; the neutral sentences of an explanation are about this."""

    woman: bool
    shirt: str  # key of SHIRTS
    hair: str  # key of HAIRS
    long_hair: bool
    glasses: bool
    room: str  # one of ROOMS
    skin: int  # index into SKINS


def _soft(distance: np.ndarray) -> np.ndarray:
    """Coverage 0..1 of a shape from a signed distance in pixels (negative inside): one pixel of antialiasing."""
    return np.clip(0.5 - distance, 0.0, 1.0)


def _ellipse(x, y, cx, cy, rx, ry) -> np.ndarray:
    """Approximate signed distance in pixels to an ellipse; exact at its border."""
    return (np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2) - 1.0) * np.minimum(rx, ry)


def _paint(image: np.ndarray, distance: np.ndarray, colour, within: np.ndarray | float = 1.0) -> None:
    """Blends `colour` into `image` [..., H, W, 3] inside of `distance` [..., H, W] and the mask `within`, in place."""
    image += (within * _soft(distance))[..., None] * (np.asarray(colour, np.float32) - image)


def _room(name: str) -> np.ndarray:
    """Background float32 [SIZE, SIZE, 3]: each room has a colour and a pattern of its own."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    wall, distance, colour = {
        "kitchen": ((225, 200, 140), np.minimum(x % 13, y % 13) - 1.0, (165, 135, 85)),  # warm tiles
        "office": ((150, 165, 190), (y % 8) - 3.0, (105, 120, 150)),  # blinds
        "garden": ((150, 205, 245), 26 + 3 * np.sin(x / 3) - y, (60, 130, 55)),  # sky over a hedge
        "street": ((110, 95, 90), np.abs(x % 16 - 8) - 3.0, (190, 170, 110)),  # dark house fronts
    }[name]
    image = np.full((SIZE, SIZE, 3), wall, np.float32)
    _paint(image, distance, colour, within=_soft(np.abs(y % 14 - 7) - 3.5) if name == "street" else 1.0)
    return image


def draw(face: np.ndarray, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Frames uint8 [FRAMES, SIZE, SIZE, 3] of one face. face: float [7] in the order of FACE.

    The expression grows from a part of its strength to the whole within the first frames; `tremble` shakes the
    features from frame to frame and makes the mouth uneven.
    """
    cx, cy = 32 + rng.uniform(-2, 2), 29.5 + rng.uniform(-1.5, 1.5)
    scale, light, onset = rng.uniform(0.95, 1.05), rng.uniform(0.85, 1.08), rng.uniform(0.4, 0.9)
    skin, hair = np.array(SKINS[look.skin], np.float32), HAIRS[look.hair]

    # What does not move: room, hair, shirt, head.  [SIZE, SIZE, 3]
    y, x = (np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) - np.array([cy, cx], np.float32)[:, None, None]) / scale
    head_y, head_x = y, x
    base = _room(look.room)
    _paint(base, _ellipse(x, y, 0, -5, 24.5, 24), hair)
    if look.long_hair:
        _paint(base, np.maximum(np.abs(x) - 24.5, np.abs(y - 8) - 16), hair)
    _paint(base, np.maximum(np.abs(x) - 8, np.abs(y - 24) - 8), skin * 0.85)
    _paint(base, _ellipse(x, y, 0, 42, 35, 18), SHIRTS[look.shirt])
    head = _ellipse(x, y, 0, 0, 21, 24.5)
    _paint(base, head, skin)
    _paint(base, y + 18.5 - 0.012 * x**2, hair, within=_soft(head))  # fringe

    # What moves: features in crops of the upper and lower face, all frames at once.  [FRAMES, h, w]
    step = np.arange(FRAMES, dtype=np.float32)
    grow = np.clip(onset + (1 - onset) * step / 2.5, 0, 1)
    curve, opening, slant, height, eyes, skew, tremble = (v * grow[:, None, None] for v in face.astype(np.float32))
    shake = (-1.0) ** step[:, None, None] * tremble
    image = np.repeat(base[None], FRAMES, axis=0)
    dark, lips = np.array((35, 25, 25), np.float32), skin * np.array((0.72, 0.38, 0.38), np.float32)

    def cropped(top: int, bottom: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns = slice(top, bottom), slice(10, 54)
        return image[:, rows, columns], head_x[rows, columns] + 0.9 * shake, head_y[rows, columns] + 0.5 * shake

    crop, x, y = cropped(5, 37)
    side = np.abs(x)
    half = np.maximum(3.4 * (1 + 0.8 * eyes), 0.7)  # half height of the eyes
    _paint(crop, _ellipse(side, y, 9, -3.5, 6.0, half + 0.9), skin * 0.45)
    white = _ellipse(side, y, 9, -3.5, 5.2, half)
    _paint(crop, white, (250, 250, 250))
    _paint(crop, _ellipse(side, y, 9, -3.5, 2.3, 2.3), dark, within=_soft(white))
    along = (side - 9) / 6.5  # -1 at the inner end of a brow, 1 at the outer
    brow = -10.8 - 3.2 * height - 3.4 * slant * along
    _paint(crop, np.maximum(np.abs(y - brow) - 1.3, np.abs(along) * 6.5 - 6.5), np.array(hair) * 0.55)
    if look.glasses:
        rim = np.abs(_ellipse(side, y, 9, -3.5, 7.4, 6.8)) - 0.55
        _paint(crop, np.minimum(rim, np.maximum(side - 2, np.abs(y + 4) - 0.5)), (40, 40, 60))

    crop, x, y = cropped(28, 58)
    side = np.abs(x)
    _paint(crop, np.maximum(np.abs(side - 2.2) - 0.7, np.abs(y - 5.5) - 1.2), dark, within=0.5)  # nose
    wrinkle = np.abs(y + 0.3 * side - (1 + 3.0 * (y > 2.2)))
    _paint(crop, np.maximum(wrinkle - 0.7, side - 4.0), skin * 0.4, within=skew)
    width = 9.0 + 1.5 * np.maximum(curve, 0) - 2.5 * opening * (1 - np.abs(curve))
    across = x / width
    line = 13.0 + 3.6 * curve * (1 - 2 * across**2) - 3.2 * skew * across
    line = line + 1.5 * tremble * np.sin(1.5 * x + np.pi * step[:, None, None])
    gap = 4.6 * opening * np.clip(1 - across**2, 0, 1)
    edge = side - width
    _paint(crop, np.maximum(np.abs(y - line) - gap - 1.4, edge), lips)
    _paint(crop, np.maximum(np.abs(y - line) - gap + 0.3, edge + 1), dark)
    return np.clip(image * light, 0, 255).astype(np.uint8)


def voice(params: np.ndarray, look: Look, rng: np.random.Generator) -> np.ndarray:
    """Waveform float32 [RATE], 16 kHz mono, one second. params: float [6] in the order of VOICE."""
    pitch, tempo, tremolo, loudness, glide, roughness = (float(v) for v in params)
    t = np.arange(RATE, dtype=np.float32) / RATE
    flutter = np.sin(2 * np.pi * (8.5 * t + rng.uniform()))
    f0 = (185 if look.woman else 160) * 2 ** (0.75 * pitch + 0.9 * glide * (t - 0.5)) * (1 + 0.05 * tremolo * flutter)
    z = np.exp(2j * np.pi * np.cumsum(f0, dtype=np.float64) / RATE).astype(np.complex64)
    tone, power = np.zeros(RATE, np.float32), np.ones(RATE, np.complex64)
    for k in range(1, 13):
        power = power * z
        tone += power.imag * k ** (-1.3 + 0.4 * loudness)
    syllables = (0.5 - 0.5 * np.cos(2 * np.pi * (3.2 * 2 ** (0.9 * tempo) * t + rng.uniform()))) ** 0.7
    noise = rng.standard_normal(RATE, dtype=np.float32)
    tone = tone * (1 - 0.35 * tremolo * (1 + flutter)) * (1 + roughness * (0.5 * np.sin(2 * np.pi * 47 * t)))
    tone = (tone + 0.45 * roughness * noise) * (0.15 + 0.85 * syllables)
    return np.clip(0.11 * 2 ** (1.3 * loudness) * tone + 0.002 * noise, -0.98, 0.98).astype(np.float32)


def encode(frames: np.ndarray, waveform: np.ndarray) -> bytes:
    """An MP4 file: frames uint8 [T, H, W, 3] as H.264 at FPS, waveform float32 [N] as AAC, 16 kHz mono.

    One x264 thread, so that the same input gives the same bytes.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FPS, options={
            "preset": "ultrafast", "tune": "zerolatency", "crf": "20", "threads": "1"})
        video.height, video.width, video.pix_fmt = *frames.shape[1:3], "yuv420p"
        audio = container.add_stream("aac", rate=RATE, layout="mono", options={"aac_coder": "fast"})
        audio.bit_rate = 48_000
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
        for start in range(0, len(waveform), 1024):  # an AAC frame holds 1,024 samples
            piece = av.AudioFrame.from_ndarray(waveform[None, start:start + 1024], format="fltp", layout="mono")
            piece.sample_rate, piece.pts, piece.time_base = RATE, start, Fraction(1, RATE)
            container.mux(audio.encode(piece))
        container.mux(audio.encode())
    return buffer.getvalue()
