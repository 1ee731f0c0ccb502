"""Containers, packets, damage: a file -> the chosen frames and the sound. Skip it at first reading.

PyAV decodes video and the sound in it, soundfile WAV and FLAC; imported inside functions: a GPU machine may lack both.
- Memory is bounded: only the chosen frames are kept, and sound is decoded up to `max_samples`.
- Display matrices of phones (turned, mirrored) are applied, so that a person stands as `ffmpeg` shows it.
- Sound is one channel at 16 kHz, mixed as `ffmpeg -ac 1` does by the channels' places. Its first sample is placed at 0
  however late it begins, and gaps in its times are closed, as in `ffmpeg -vn`.
- Nothing is made up: a clip that is damaged, or cut off before the end it declares, raises ClipError. 5% (or 0.1 s)
  may be missing at the end, because headers are that inexact. What cannot be seen: a cut GIF (it declares no length),
  and damage that a decoder conceals.
"""

import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from erv_min.base.errors import ClipError

SAMPLE_RATE = 16_000
MAX_PIXELS = 2**26  # 8192 x 8192 per frame; a header that declares more is refused before anything is allocated
NO_CLIPS = {b"version https://git-lfs": "a git-lfs pointer, not the clip itself: fetch it with `git lfs pull`",
            b"\0\5\x16\7": "what macOS keeps beside a file (AppleDouble), not the clip itself: leave it out"}
PICTURES = (".jpg", ".jpeg", ".png", ".bmp")
SOUND_FILES = (".wav", ".flac")


def decode(path: Path, choose: Callable[[int], list[int]] | None, max_samples: int,
           n_frames: int = 0) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The frames [k, H, W, 3] uint8 that `choose` names (number of frames -> k indices; None: no frames), and up to
    max_samples of the waveform [N] float32 (0: no sound). None for what is not asked, or for sound that is not there.

    One pass if the declared number of frames is right (MP4, AVI). If none is declared (MKV, WebM), or a wrong one (edit
    lists, hidden frames), once more with the counted `n_frames`.
    """
    if pictures := frame_files(path):
        return _decode_pictures(pictures, choose) if choose else None, None
    if path.suffix.lower() in SOUND_FILES:
        if choose:
            raise ClipError(f"{path}: has no video; use modality 'audio'")
        return None, _mono(_sound_file(path, max_samples), max_samples)
    with _opened(path) as container:
        video = _video_stream(container, path) if choose else None
        audio = container.streams.best("audio") if max_samples else None
        if audio and audio.codec_context is None:
            raise ClipError(f"{path}: no decoder for its sound; convert it to AAC")
        n_frames = n_frames or (video.frames if video else 0)
        indices = choose(n_frames) if n_frames else []
        kept, to_rgb = dict.fromkeys(indices), _rgb_converter()
        decoded, sound, samples = 0, [], -100  # the resampler looks ahead
        for packet in _packets(container, path):
            if packet.stream is video:
                for frame in packet.decode():
                    if decoded in kept:
                        kept[decoded] = to_rgb(frame)
                    decoded += 1
            elif packet.stream is audio and samples < max_samples:
                for frame in packet.decode():
                    sound.append(frame)
                    samples += frame.samples * SAMPLE_RATE / frame.sample_rate
            elif not video and samples >= max_samples:
                break
        waveform = _mono(sound, max_samples)
    if not choose:
        return None, waveform
    if not decoded:
        raise ClipError(f"{path}: has no frame that can be decoded; replace the file or leave the clip out")
    if decoded != n_frames:
        return decode(path, choose, 0, decoded)[0], waveform
    return torch.from_numpy(np.stack([kept[i] for i in indices])), waveform


def frame_files(folder: Path) -> list[Path]:
    """The pictures in a folder, which is a clip as its frames, in natural order (9.jpg before 10.jpg); else []."""
    _, _, names = next(os.walk(folder), ("", [], []))
    names = [name for name in names if name.lower().endswith(PICTURES) and not name.startswith(".")]
    parts = {name: [int(x) if i % 2 else x for i, x in enumerate(re.split("([0-9]+)", name))] for name in names}
    return [folder / name for name in sorted(names, key=parts.get)]


def _decode_pictures(files: list[Path], choose: Callable[[int], list[int]]) -> torch.Tensor:
    indices, to_rgb = choose(len(files)), _rgb_converter()
    kept = dict.fromkeys(indices)
    for i in kept:
        with _opened(files[i]) as container:
            kept[i], *_ = map(to_rgb, container.decode(_video_stream(container, files[i])))
    return torch.from_numpy(np.stack([kept[i] for i in indices]))


@contextmanager
def _opened(path: Path):
    """The file as an open container. What PyAV and soundfile raise becomes ClipError."""
    import av
    if not path.is_file():
        raise ClipError(f"{path}: {'not a file, nor a folder of pictures' if path.exists() else 'no such file'}")
    # Tags that are not UTF-8 must not stop a clip; PyAV 19 reads them as bytes and has no such option any more.
    tags = {"metadata_errors": "ignore"} if int(av.__version__[:2]) < 19 else {}
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        for known, what in NO_CLIPS.items():
            if start.startswith(known):
                raise ClipError(f"{path}: {what}")
        size, declared = path.stat().st_size, int.from_bytes(start[4:8], "little")
        if start.startswith(b"RIFF") and size < 0.95 * declared < 2e9:  # WAV, AVI; 2 or 4 GiB: written to a pipe
            raise ClipError(f"{path}: cut off after {size} of {declared} bytes; replace the file or leave it out")
        options = {"max_pixels": str(MAX_PIXELS)}
        if path.suffix.lower() in PICTURES:
            options["err_detect"] = "explode"  # or a cut one is half grey
        with av.open(f"file:{path}", options=options, **tags) as container:
            for stream in container.streams:
                if stream.codec_context:
                    stream.codec_context.options = options
            yield container
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
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
        raise ClipError(f"{path}: frames of {codec.width} x {codec.height} pixels, none or too many: scale it down; if "
                        "it is an animated WebP, which this FFmpeg may be unable to read, convert it to GIF or MP4")
    codec.thread_type = "AUTO" if codec.width * codec.height >= 2**18 else "NONE"  # threads cost more than tiny frames
    return streams[0]


def _packets(container, path: Path):
    """All packets of the file. Raises ClipError for a broken one, or for an end before the declared one."""
    start, end, joined = float("inf"), 0.0, False
    name, video = container.format.name, container.streams.video
    for packet in container.demux():
        if packet.is_corrupt and not (joined := joined or name == "mpegts" and _is_joined(path)):
            raise ClipError(f"{path}: damaged or cut off; replace the file or leave the clip out")
        if packet.pts is not None:
            tick = float(packet.time_base)
            start, end = min(start, packet.pts * tick), max(end, (packet.pts + (packet.duration or 0)) * tick)
        yield packet
    declared, reached = 0.0, max(0.0, end - max(0.0, start))  # in seconds; what other formats declare is an estimate
    if re.search("mov|matroska", name):
        declared = (container.duration or 0) / 1e6
    elif name == "avi" and video and video[0].average_rate:
        declared = max(video[0].frames - 1, 0) / float(video[0].average_rate)  # some writers count one more
    counts_from_0 = abs(declared - end) < 0.05 * reached  # as FFmpeg's Matroska does; others' count from the start
    if declared - reached > max(0.1, 0.05 * declared) and not counts_from_0:
        raise ClipError(f"{path}: cut off after {reached:.2f} of {declared:.2f} s; replace the file or leave it out")


def _is_joined(path: Path) -> bool:
    """Whether the counters of a transport stream jump only where files were joined by `cat`, which FFmpeg takes for
    damage: the counter of its tables (streams 0 and 17) jumps, too, and each stream goes on with a unit's start."""
    data = np.memmap(path, np.uint8, "r")
    size = 188 if data[0] == 0x47 else 192  # M2TS: a time of 4 bytes before each packet
    header = data[: len(data) // size * size].reshape(-1, size)[:, size - 188 : size - 184].astype(int)  # [packets, 4]
    if (header[:, 0] != 0x47).any() or (header[:, 1] & 0x80).any():  # out of step, or marked as broken
        return False
    stream, starts, counter = header[:, 1] % 32 * 256 + header[:, 2], header[:, 1] & 0x40 > 0, header[:, 3] % 16
    order = np.flatnonzero(header[:, 3] & 0x10)  # those with content
    order = order[np.argsort(stream[order], kind="stable")]
    jumps = (np.diff(stream[order]) == 0) & (np.diff(counter[order]) % 16 > 1)  # 0: sent twice
    before, after = order[:-1][jumps], order[1:][jumps]
    tables = np.isin(stream[after], (0, 17))
    joints = np.sort(after[tables])
    joined = starts[after] & (np.searchsorted(joints, before) < np.searchsorted(joints, after))
    return bool((joined | tables | (stream[after] == 0x1FFF)).all())  # the last is padding


def _rgb_converter():
    """A function: decoded frame -> upright uint8 [H, W, 3], scaled to the first one's size if the clip changes it."""
    import av
    reformatter, size = av.video.reformatter.VideoReformatter(), None  # one per clip: it costs more than a small frame
    threads = {"threads": 1} if int(av.__version__[:2]) >= 17 else {}  # the default is a pool of threads from 17 on

    def to_rgb(frame) -> np.ndarray:
        nonlocal size
        size = size or (frame.width, frame.height)
        rgb = reformatter.reformat(frame, *size, "rgb24", **threads).to_ndarray()
        matrix = frame.side_data.get("DISPLAYMATRIX")  # the pixel (x, y) is shown at (a x + c y, b x + d y)
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist() if matrix else (1, 0, 0, 0, 1)
        if abs(b) + abs(c) > abs(a) + abs(d):
            rgb, a, d = rgb.swapaxes(0, 1), c, b
        return rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return to_rgb


def _sound_file(path: Path, max_samples: int) -> list:
    """The sound of a WAV or FLAC as PyAV's frames: soundfile notices damage, FFmpeg knows the channels' places."""
    import av
    import soundfile
    frames, samples = [], 0.0
    with _opened(path) as header, soundfile.SoundFile(str(path)) as file:
        if not header.streams.audio or not header.streams.audio[0].codec_context:
            raise ClipError(f"{path}: no decoder for its sound; convert it to PCM")
        layout = header.streams.audio[0].layout
        while samples < max_samples + 100 and len(block := file.read(2**16, "float32", always_2d=True)):  # [n, C]
            frame = av.AudioFrame.from_ndarray(block.reshape(1, -1), "flt", layout)
            frame.sample_rate = file.samplerate
            frames.append(frame)
            samples += len(block) * SAMPLE_RATE / file.samplerate
    return frames


def _mono(frames: list, max_samples: int) -> torch.Tensor | None:
    """Decoded sound -> one channel at 16 kHz, [N] float32, None if there is none. It may change its layout, rate or
    format midway."""
    import av

    def resampled(part: list, layout: str) -> list:
        resampler = av.AudioResampler("flt", layout, SAMPLE_RATE)
        return [new for frame in (*part, None) for new in resampler.resample(frame)]  # None: the resampler's rest

    chunks = [np.empty(0, np.float32)]
    for (_, layout, _), part in groupby(frames, lambda x: (x.format.name, x.layout.name, x.sample_rate)):
        part = list(part)
        try:
            new = resampled(part, "mono")
        except av.FFmpegError:  # it has no mix for these channels (9 without places; FL and FC): take their mean
            new = resampled(part, layout)
        chunks += [frame.to_ndarray().reshape(frame.samples, -1).mean(1) for frame in new]
    waveform = np.concatenate(chunks)[:max_samples]
    return torch.from_numpy(np.where(np.isnan(waveform), np.float32(-1.5), waveform)) if len(waveform) else None
