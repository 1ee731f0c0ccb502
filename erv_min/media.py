"""A clip on disk -> frames and waveform -> pixel values and log-mel: what the released system feeds its two towers.

The numbers are the release's (decord's frames, Pillow's resize, Whisper's log-mel), computed with torch alone.
Left out: frames by time (indices count frames, also at a variable frame rate), pixel aspect ratio, interlacing.
"""

import sys
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from erv_min.base.decode import SAMPLE_RATE, decode
from erv_min.base.errors import ClipError, SettingsError

N_FFT, HOP = 400, 160  # Whisper's window and step: 25 ms and 10 ms


@dataclass
class Clip:
    """One clip as the model takes it; a modality that was not asked for is None."""
    video: torch.Tensor | None = None  # [T, 3, S, S] float32 in -1..1
    audio: torch.Tensor | None = None  # [mels, frames] float32, Whisper's log-mel
    silent: bool = False  # sound was asked for, the file has none, and `audio` is that of silence


def sample_frame_indices(n_frames: int, k: int) -> list[int]:
    """The k of n_frames that the release looks at: the middles of k equal segments."""
    if n_frames < 1 or k < 1:
        raise ValueError(f"cannot choose {k} of {n_frames} frames")
    segment = (n_frames - 1) / k
    return [round(segment * (i + 0.5) + 1e-6) for i in range(k)]


def load_frames(path: str | Path, k: int) -> torch.Tensor:
    """The k sampled frames of a clip, upright: uint8 [k, H, W, 3]. Raises ClipError."""
    return decode(Path(path), partial(sample_frame_indices, k=k), 0)[0]


def load_waveform(path: str | Path) -> torch.Tensor:
    """The sound of a clip at 16 kHz, mono: float32 [N]; two channels mix as (L + R) * 0.7071; sound that begins late
    begins at 0; NaN samples are -1.5 (base/decode.py). Raises ClipError."""
    return _sound_or_silence(path, decode(Path(path), None, sys.maxsize)[1], "error")


@torch.autocast("cpu", enabled=False)  # a training loop that computes in bfloat16 still gets its clips in float32
def load_clip(path: str | Path, modality: str = "video_audio", num_frames: int = 8, image_size: int = 224,
              n_mels: int = 128, n_frames: int = 3000, geometry: str = "pad", silence: str = "hear",
              without: str = "") -> Clip:
    """Reads what `modality` asks for: `num_frames` frames of `image_size`; `n_frames` log-mel frames (10 ms each) of
    `n_mels` bins. Raises ClipError.

    A clip whose file has no sound: `silence` "hear" gives 10 s of digital silence, as the release does, "error" raises
    ClipError (divergence 19). `without` "video": the same number of black frames; "audio": digital silence."""
    if modality not in ("video_audio", "video", "audio"):
        raise SettingsError(f"modality {modality!r}: use video_audio, video or audio")
    choose = partial(sample_frame_indices, k=num_frames) if "video" in modality else None
    frames, waveform = decode(Path(path), choose, n_frames * HOP if "audio" in modality else 0)
    clip = Clip()
    if "video" in modality:
        clip.video = pixel_values(torch.zeros_like(frames) if without == "video" else frames, image_size, geometry)
    if "audio" in modality:
        clip.silent = waveform is None
        waveform = _sound_or_silence(path, waveform, silence)
        clip.audio = log_mel(torch.zeros_like(waveform) if without == "audio" else waveform, n_mels, n_frames)
    return clip


def _sound_or_silence(path, waveform: torch.Tensor | None, silence: str) -> torch.Tensor:
    if waveform is None and silence == "error":
        raise ClipError(f"{path}: has no sound; leave it out, or take --silence hear, or --modality video")
    return torch.zeros(10 * SAMPLE_RATE) if waveform is None else waveform


def pixel_values(frames: torch.Tensor, size: int, geometry: str = "pad") -> torch.Tensor:
    """Frames as SigLIP takes them: uint8 [k, H, W, 3] -> float32 [k, 3, size, size] in -1..1.

    "pad" centres the frame on a grey square, "stretch" gives up its proportions (divergence 11). The resize is
    Pillow's: the horizontal pass first, each pass clamped and rounded to 8 bits."""
    if geometry not in ("pad", "stretch"):
        raise SettingsError(f"geometry {geometry!r}: use pad or stretch")
    frames = torch.as_tensor(frames)
    height, width = frames.shape[1:3]
    x_gap, y_gap = (max(height - width, 0), max(width - height, 0)) if geometry == "pad" else (0, 0)
    margins = (x_gap // 2, x_gap - x_gap // 2, y_gap // 2, y_gap - y_gap // 2)  # left, right, top, bottom
    horizontal, vertical = _bicubic(width + x_gap, size).T, _bicubic(height + y_gap, size)
    out = []
    for few in frames.split(max(1, 2**22 // (height * width))):  # float32 copies of a few megapixels at a time
        x = F.pad(few.permute(0, 3, 1, 2).float(), margins, value=127)  # [k, 3, H, W]; 127 = int(255 * mean)
        x = (x @ horizontal + 0.5).floor_().clamp_(0, 255)  # [k, 3, H, size]
        out.append((vertical @ x + 0.5).floor_().clamp_(0, 255))  # [k, 3, size, size]
    return (torch.cat(out) / 255 - 0.5) / 0.5


@lru_cache(maxsize=64)
def _bicubic(n_in: int, n_out: int) -> torch.Tensor:
    """Pillow's antialiased bicubic (a = -0.5) as a matrix [n_out, n_in]; the kernel widens if the image shrinks."""
    scale = n_in / n_out
    widen = max(scale, 1.0)
    centre = (torch.arange(n_out, dtype=torch.float64)[:, None] + 0.5) * scale  # [n_out, 1]
    first, end = (centre - 2 * widen + 0.5).floor(), (centre + 2 * widen + 0.5).floor()
    j = torch.arange(n_in, dtype=torch.float64)  # [n_in]
    x = ((j - centre + 0.5) / widen).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * ((j >= first) & (j < end))
    return (weights / weights.sum(1, keepdim=True)).float()


def log_mel(waveform: torch.Tensor, n_mels: int = 128, n_frames: int = 3000) -> torch.Tensor:
    """Whisper's log-mel of a 16 kHz waveform [N] -> float32 [n_mels, n_frames], padded or cut to n_frames * 10 ms:
    log10 of the mel powers, clamped at 1e-10, floored 8 below the loudest, (x + 4) / 4; NaN becomes -1.5."""
    total = n_frames * HOP
    waveform = torch.as_tensor(waveform, dtype=torch.float32)[:total]
    heard = min(n_frames, -(-(len(waveform) + N_FFT // 2) // HOP))  # later windows hold nothing but padding
    x = F.pad(F.pad(waveform, (0, total - len(waveform)))[None], (N_FFT // 2, N_FFT // 2), mode="reflect")[0]
    spectrum = torch.stft(x[: (heard - 1) * HOP + N_FFT], N_FFT, HOP, window=torch.hann_window(N_FFT), center=False,
                          return_complex=True)  # [201, heard]
    mel = torch.full((n_mels, n_frames), -10.0)  # log10(1e-10)
    mel[:, :heard] = (_mel_filters(n_mels) @ spectrum.abs() ** 2).clamp(min=1e-10).log10()
    mel = (torch.maximum(mel, mel.max() - 8) + 4) / 4
    return torch.where(mel.isnan(), -1.5, mel)


@lru_cache(maxsize=8)
def _mel_filters(n_mels: int) -> torch.Tensor:
    """Slaney's mel filters [n_mels, 201] up to 8 kHz: linear to 1 kHz, then logarithmic; each of unit area."""
    top = 15 + 27 * np.log(8) / np.log(6.4)  # 8 kHz: 15 mel are 1 kHz, each 27 mel more a factor of 6.4
    mels = np.linspace(0, top, n_mels + 2)
    hertz = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))
    bins = np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
    rise = (bins - hertz[:-2, None]) / np.diff(hertz)[:-1, None]
    fall = (hertz[2:, None] - bins) / np.diff(hertz)[1:, None]
    filters = np.maximum(0, np.minimum(rise, fall)) * (2 / (hertz[2:] - hertz[:-2]))[:, None]
    return torch.from_numpy(filters).float()
