"""A clip on disk -> frames and waveform -> pixel values and log-mel: what the released system feeds its two towers.

The numbers are the release's (decord's frames, Pillow's resize, Whisper's log-mel), computed with torch alone.
PyAV decodes video and the sound in it, soundfile WAV and FLAC; imported inside functions: a GPU machine may lack both.
- Memory is bounded: only the k wanted frames are kept, and load_clip stops decoding sound where the log-mel ends.
  A clip of more than LONG_CLIP frames is decoded only around the wanted frames, with the same result.
- Rotation marks of phones are applied, as decord does, so that a person stands upright; mirror marks are not.
- Nothing is made up: a clip that is damaged, or cut off before the end it declares, raises ClipError. 5% (or 0.1 s)
  may be missing at the end, because headers are that inexact. What cannot be seen: a cut GIF (it declares no length),
  damage that a decoder conceals, and damage in the parts of a long clip that are never decoded.
Left out: frames by time (indices count frames, also at a variable frame rate), pixel aspect ratio, interlacing.
"""

import re
import sys
from array import array
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from erv_min.run.errors import ClipError, SettingsError

SAMPLE_RATE = 16_000
N_FFT, HOP = 400, 160  # Whisper's window and step: 25 ms and 10 ms
MAX_PIXELS = 2**26  # 8192 x 8192 a frame; a header that declares more is refused before anything is allocated
LONG_CLIP = 1500  # frames; above it, the wanted frames are found by seeking
SEEKABLE = ("h264", "hevc", "vp9", "av1", "libdav1d")  # one shown frame a packet, and a keyframe is a fresh start
SOUND_FILES = (".wav", ".flac")
NO_TIME = -(2**63)


@dataclass
class Clip:
    """One clip as the model takes it; a modality that was not asked for is None."""
    path: Path
    video: torch.Tensor | None  # [T, 3, S, S] float32 in -1..1
    audio: torch.Tensor | None  # [mels, frames] float32, Whisper's log-mel


def sample_frame_indices(n_frames: int, k: int) -> list[int]:
    """The k of n_frames that the release looks at: the middles of k equal segments (released-code.md, section 3)."""
    if n_frames < 1 or k < 1:
        raise ValueError(f"cannot choose {k} of {n_frames} frames")
    segment = (n_frames - 1) / k
    return [round(segment * (i + 0.5) + 1e-6) for i in range(k)]


def load_frames(path: str | Path, k: int) -> torch.Tensor:
    """The k sampled frames of a clip, upright: uint8 [k, H, W, 3]. Raises ClipError."""
    return _decode(Path(path), k, 0)[0]


def load_waveform(path: str | Path, silence: bool = False, max_seconds: float | None = None) -> torch.Tensor:
    """The sound of a clip at 16 kHz, mono: float32 [N]; two channels mix as (L + R) * 0.7071, NaN samples are -1.5.

    `max_seconds` stops there, with the same samples up to that point. Raises ClipError where there is no sound, or
    returns 10 s of zeros where `silence` asks for it.
    """
    max_samples = sys.maxsize if max_seconds is None else round(max_seconds * SAMPLE_RATE)
    return _sound_or_silence(path, _decode(Path(path), 0, max_samples)[1], silence)


def has_audio(path: str | Path) -> bool:
    """Whether the file has sound that decodes. Raises ClipError where the file cannot be read."""
    return _decode(Path(path), 0, 1)[1] is not None


def load_clip(path: str | Path, modality: str = "video_audio", num_frames: int = 8, image_size: int = 224,
              n_mels: int = 128, n_frames: int = 3000, geometry: str = "pad", silence: bool = False) -> Clip:
    """Reads what `modality` asks for, in one pass over the file.

    `num_frames` frames of `image_size`; `n_frames` log-mel frames (10 ms each) of `n_mels` bins. Raises ClipError,
    also for a clip without the sound that was asked for (unless `silence` allows zeros in its place).
    """
    if modality not in ("video_audio", "video", "audio", "text"):
        raise SettingsError(f"modality {modality!r}: use video_audio, video, audio or text")
    path, video, audio = Path(path), "video" in modality, "audio" in modality
    if not video and not audio:
        return Clip(path, None, None)
    frames, waveform = _decode(path, num_frames * video, n_frames * HOP * audio)
    return Clip(path, pixel_values(frames, image_size, geometry) if video else None,
                log_mel(_sound_or_silence(path, waveform, silence), n_mels, n_frames) if audio else None)


def _sound_or_silence(path, waveform: torch.Tensor | None, silence: bool) -> torch.Tensor:
    if waveform is None and not silence:
        raise ClipError(f"{path}: has no sound; use modality 'video', or ask for silence in its place")
    return torch.zeros(10 * SAMPLE_RATE) if waveform is None else waveform


# ---- decoding --------------------------------------------------------------------------------------------------------

@contextmanager
def _opened(path: Path):
    """The file, open: a SoundFile for WAV and FLAC, else a PyAV container. Whatever they raise becomes ClipError."""
    import av
    import soundfile
    if not path.is_file():
        raise ClipError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    # Tags that are not UTF-8 must not stop a clip; PyAV 19 reads them as bytes and has no such option any more.
    tags = {"metadata_errors": "ignore"} if int(av.__version__[:2]) < 19 else {}
    try:
        with (soundfile.SoundFile(str(path)) if path.suffix.lower() in SOUND_FILES else
              av.open(f"file:{path}", options={"max_pixels": str(MAX_PIXELS)}, **tags)) as source:
            yield source
    except (av.FFmpegError, soundfile.SoundFileError, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ClipError(f"{path}: cannot be decoded ({reason}); replace the file or leave the clip out") from error


def _video_stream(container, path: Path):
    """The video track, its decoder set up. Cover art is none. Raises ClipError for none, or an absurd frame size."""
    from av.stream import Disposition
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    codec = streams[0].codec_context if streams else None
    if codec is None:
        raise ClipError(f"{path}: {'no decoder for its video' if streams else 'has no video'}")
    if not 0 < codec.width * codec.height <= MAX_PIXELS:  # over the limit, some demuxers report 0 x 0
        raise ClipError(f"{path}: frames of {codec.width} x {codec.height} pixels, none or too many; scale it down")
    codec.options = {"max_pixels": str(MAX_PIXELS)}
    codec.thread_type = "AUTO" if codec.width * codec.height >= 2**18 else "NONE"  # threads cost more than tiny frames
    return streams[0]


def _decode(path: Path, k: int, max_samples: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """k sampled frames [k, H, W, 3] and up to max_samples of the waveform [N]; None for what is not asked or not there.

    One pass where the declared number of frames is right (MP4, AVI). Where none is declared (MKV, WebM) or the clip is
    long, packets are counted first; where the count was wrong (edit lists, hidden frames), once more with the real one.
    """
    if path.suffix.lower() in SOUND_FILES:
        if k:
            raise ClipError(f"{path}: has no video; use modality 'audio'")
        return None, _decode_sound_file(path, max_samples)
    frames, waveform, n_frames, counted = None, None, 0, False
    while k and frames is None:
        with _opened(path) as container:
            video = _video_stream(container, path)
            n_frames = n_frames or video.frames
            if not counted and not 0 < n_frames <= LONG_CLIP:
                times, keys = _count(container, path, video)
                n_frames, counted = len(times), True
                if n_frames > LONG_CLIP:
                    frames = _frames_by_seeking(container, video, times, keys, sample_frame_indices(n_frames, k))
            else:
                kept, decoded, sound = _decode_in_order(container, path, video, n_frames, k, max_samples)
                waveform, max_samples = (sound, 0) if max_samples else (waveform, 0)
                frames = kept if decoded == n_frames else None
                n_frames = decoded
        if not n_frames:
            raise ClipError(f"{path}: has no frame that can be decoded; replace the file or leave the clip out")
    if max_samples:
        with _opened(path) as container:
            waveform = _decode_in_order(container, path, None, 0, 0, max_samples)[2]
    return torch.from_numpy(np.stack(frames)) if k else None, waveform


def _packets(container, path: Path):
    """All packets of the file. Raises ClipError for a broken one, or for an end before the declared one."""
    ends = {}
    for packet in container.demux():
        if packet.is_corrupt:
            raise ClipError(f"{path}: damaged or cut off; replace the file or leave the clip out")
        if packet.pts is not None:
            i = packet.stream_index
            ends[i] = max(ends.get(i, packet.pts), packet.pts + (packet.duration or 0))
        yield packet
    # MP4 and Matroska declare how long they are, AVI how many frames it has; what others declare is an estimate.
    seconds = {i: float(end * container.streams[i].time_base) for i, end in ends.items()}
    declared = reached = 0.0
    if "mov" in container.format.name or "matroska" in container.format.name:
        declared, reached = (container.duration or 0) / 1e6, max(seconds.values(), default=0)
        reached -= (container.start_time or 0) / 1e6
    elif container.format.name == "avi" and container.streams.video and container.streams.video[0].average_rate:
        stream = container.streams.video[0]
        declared = max(stream.frames - 1, 0) / float(stream.average_rate)  # some writers count one more
        reached = seconds.get(stream.index, 0)
    if declared - reached > max(0.1, 0.05 * declared):
        raise ClipError(f"{path}: cut off after {reached:.2f} of {declared:.2f} s; replace the file or leave it out")


def _decode_in_order(container, path: Path, video, n_frames: int, k: int, max_samples: int):
    """One pass: the k frames to keep if there are n_frames, how many there were, the waveform (or None)."""
    import av
    audio = container.streams.best("audio") if max_samples else None
    if audio and audio.codec_context is None:
        raise ClipError(f"{path}: no decoder for its sound; convert it to AAC")
    if not video and not audio:
        return [], 0, None
    indices = sample_frame_indices(n_frames, k) if video else []
    wanted, kept, decoded, chunks, samples = set(indices), {}, 0, [], 0
    to_rgb, resampler = _rgb_converter(), av.AudioResampler("fltp", "mono", SAMPLE_RATE)
    for packet in _packets(container, path):
        if packet.stream is video:
            for frame in packet.decode():
                if decoded in wanted:
                    kept[decoded] = to_rgb(frame)
                decoded += 1
        elif packet.stream is audio and samples < max_samples:
            for frame in packet.decode():
                samples += _resample(resampler, frame, chunks)
        elif not video and samples >= max_samples:
            break
    return [kept[i] for i in indices if i in kept], decoded, _waveform(chunks, resampler, max_samples)


def _count(container, path: Path, video) -> tuple[array, list[tuple[int, int]]]:
    """All packets without decoding: the frames' times, sorted, and (pts, dts) of each keyframe."""
    times, keys = array("q"), []
    for packet in _packets(container, path):
        if packet.stream is video and packet.size and not packet.is_discard:
            times.append(NO_TIME if packet.pts is None else packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
    return array("q", sorted(times)), sorted(keys)


def _frames_by_seeking(container, video, times: array, keys: list, indices: list[int]) -> list[np.ndarray] | None:
    """The frames that decoding in order would give, each decoded from the keyframe before it and known by its time.

    None (decode in order instead) where times are missing or not unique, or where container or codec do not promise
    that a frame needs nothing from before its keyframe.
    """
    exact = "mov" in container.format.name or "matroska" in container.format.name
    if not exact or video.codec_context.name not in SEEKABLE or times[0] == NO_TIME or len(set(times)) < len(times):
        return None
    to_rgb, kept, position = _rgb_converter(), {}, NO_TIME
    for i in sorted(set(indices)):
        before = bisect_right(keys, (times[i], sys.maxsize)) - 1
        if before < 0:
            return None
        if keys[before][0] > position:  # a keyframe lies between the last frame and this one: jump to it
            container.seek(keys[before][1], stream=video)
            decoder = container.decode(video)
        frame = next((f for f in decoder if f.pts is None or f.pts >= times[i]), None)
        if frame is None or frame.pts != times[i]:
            return None
        kept[i], position = to_rgb(frame), times[i]
    return [kept[i] for i in indices]


def _rgb_converter():
    """A function: decoded frame -> upright uint8 [H, W, 3], scaled to the first one's size if the clip changes it."""
    import av
    reformatter, size = av.video.reformatter.VideoReformatter(), []  # one a clip: it costs more than a small frame does
    threads = {"threads": 1} if int(av.__version__[:2]) >= 17 else {}  # the default is a pool of threads from 17 on

    def to_rgb(frame) -> np.ndarray:
        size[:] = size or (frame.width, frame.height)
        rgb = reformatter.reformat(frame, *size, "rgb24", **threads).to_ndarray()
        return np.rot90(rgb, round(frame.rotation / 90) % 4)  # both count counter-clockwise
    return to_rgb


def _resample(resampler, frame, chunks: list[np.ndarray]) -> int:
    """Appends what the resampler gives for one more frame (None: its rest); returns the number of samples."""
    new = [out.to_ndarray()[0] for out in resampler.resample(frame) if out is not None]
    chunks += new
    return sum(map(len, new))


def _waveform(chunks: list[np.ndarray], resampler, max_samples: int) -> torch.Tensor | None:
    _resample(resampler, None, chunks)
    waveform = np.concatenate(chunks)[:max_samples] if chunks else np.empty(0, np.float32)
    return torch.from_numpy(np.where(np.isnan(waveform), np.float32(-1.5), waveform)) if len(waveform) else None


def _decode_sound_file(path: Path, max_samples: int) -> torch.Tensor | None:
    """WAV and FLAC, a block at a time, through the same resampler."""
    import av
    resampler, chunks, samples = av.AudioResampler("fltp", "mono", SAMPLE_RATE), [], 0
    with _opened(path) as file:
        cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.M)  # a WAV too short
        if cut and int(cut[2]) < 0.95 * int(cut[1]) < 2e9:  # near 2 or 4 GiB: not a size, but written to a pipe
            raise ClipError(f"{path}: cut off after {cut[2]} of {cut[1]} bytes; replace the file or leave the clip out")
        layout = "mono" if file.channels == 1 else f"{file.channels} channels"
        while samples < max_samples and len(block := file.read(2**16, "float32", always_2d=True)):  # [n, C]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block.T), "fltp", layout)
            frame.sample_rate = file.samplerate
            samples += _resample(resampler, frame, chunks)
        return _waveform(chunks, resampler, max_samples)


# ---- frames -> pixel values, waveform -> log-mel ---------------------------------------------------------------------

def pixel_values(frames: torch.Tensor, size: int, geometry: str = "pad") -> torch.Tensor:
    """Frames as SigLIP takes them: uint8 [k, H, W, 3] -> float32 [k, 3, size, size] in -1..1.

    "pad" centres the frame on a grey square, "stretch" gives up its proportions (divergences.md, row 11). The resize is
    Pillow's: the horizontal pass first, each pass clamped and rounded to 8 bits.
    """
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
    """Pillow's antialiased bicubic (a = -0.5) as a matrix [n_out, n_in]; the kernel widens where the image shrinks."""
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
    """Whisper's log-mel of a 16 kHz waveform [N] -> float32 [n_mels, n_frames], padded or cut to n_frames * 10 ms.

    log10 of the mel powers, clamped at 1e-10, floored 8 below the loudest, (x + 4) / 4; NaN becomes -1.5.
    """
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
