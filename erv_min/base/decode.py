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
from pathlib import Path

import numpy as np
import torch

from erv_min.base.errors import ClipError

SAMPLE_RATE = 16_000
MAX_PIXELS = 2**26  # 8192 x 8192 per frame; a header that declares more is refused before anything is allocated
SOUND_FILES = (".wav", ".flac")
NO_CLIPS = {b"version https://git-lfs": "a git-lfs pointer, not the clip itself: fetch it with `git lfs pull`",
            b"\0\5\x16\7": "what macOS keeps beside a file (AppleDouble), not the clip itself: leave it out"}
PICTURES = (".jpg", ".jpeg", ".png", ".bmp")


def decode(path: Path, choose: Callable[[int], list[int]] | None, max_samples: int,
           n_frames: int = 0) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The frames [k, H, W, 3] uint8 that `choose` names (number of frames -> k indices; None: no frames), and up to
    max_samples of the waveform [N] float32 (0: no sound). None for what is not asked, or for sound that is not there.

    One pass if the declared number of frames is right (MP4, AVI). If none is declared (MKV, WebM), or a wrong one (edit
    lists, hidden frames), once more with the counted `n_frames`.
    """
    if path.suffix.lower() in SOUND_FILES:
        if choose:
            raise ClipError(f"{path}: has no video; use modality 'audio'")
        return None, _sound_file(path, max_samples)
    if is_frame_folder(path):
        return _frame_folder(path, choose) if choose else None, None
    with _opened(path) as container:
        video = _video_stream(container, path) if choose else None
        n_frames = n_frames or (video.frames if video else 0)
        indices = choose(n_frames) if n_frames else []
        frames, decoded, waveform = _in_order(container, path, video, indices, max_samples)
    if not choose:
        return None, waveform
    if not decoded:
        raise ClipError(f"{path}: has no frame that can be decoded; replace the file or leave the clip out")
    if decoded != n_frames:
        return decode(path, choose, 0, decoded)[0], waveform
    return torch.from_numpy(np.stack(frames)), waveform


def is_frame_folder(path: Path) -> bool:
    """Whether it is a clip as a folder of its frames, one picture each."""
    return bool(frame_files(path))


def frame_files(folder: Path) -> list[Path]:
    """The pictures in a folder in natural order, 9.jpg before 10.jpg; none in what is no folder."""
    _, _, names = next(os.walk(folder), ("", [], []))
    names = [name for name in names if name.lower().endswith(PICTURES) and not name.startswith(".")]
    parts = {name: [int(x) if i % 2 else x for i, x in enumerate(re.split("([0-9]+)", name))] for name in names}
    return [folder / name for name in sorted(names, key=parts.get)]


def _frame_folder(folder: Path, choose: Callable[[int], list[int]]) -> torch.Tensor:
    """The chosen ones of a folder's frames, as `decode` gives them."""
    files, to_rgb = frame_files(folder), _rgb_converter()
    indices = choose(len(files))
    kept = dict.fromkeys(indices)
    for i in kept:
        with _opened(files[i]) as container:
            kept[i], *_ = map(to_rgb, container.decode(_video_stream(container, files[i])))
    return torch.from_numpy(np.stack([kept[i] for i in indices]))


@contextmanager
def _opened(path: Path):
    """The file, open: a SoundFile for WAV and FLAC, else a PyAV container. Whatever they raise becomes ClipError."""
    import av
    import soundfile
    if not path.is_file():
        raise ClipError(f"{path}: {'not a file, nor a folder of pictures' if path.exists() else 'no such file'}")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
        for known, what in NO_CLIPS.items():
            if start.startswith(known):
                raise ClipError(f"{path}: {what}")
        with soundfile.SoundFile(str(path)) if path.suffix.lower() in SOUND_FILES else _container(path) as source:
            yield source
    except (av.FFmpegError, soundfile.SoundFileError, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ClipError(f"{path}: cannot be decoded ({reason}); replace the file or leave the clip out") from error


def _container(path: Path):
    import av
    # Tags that are not UTF-8 must not stop a clip; PyAV 19 reads them as bytes and has no such option any more.
    tags = {"metadata_errors": "ignore"} if int(av.__version__[:2]) < 19 else {}
    return av.open(f"file:{path}", options={"max_pixels": str(MAX_PIXELS)}, **tags)


def _video_stream(container, path: Path):
    """The video track, its decoder set up. Cover art is none. Raises ClipError for none, or an absurd frame size."""
    from av.stream import Disposition
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    codec = streams[0].codec_context if streams else None
    if codec is None:
        raise ClipError(f"{path}: {'no decoder for its video' if streams else 'has no video'}")
    if container.format.name == "webp_pipe" and not codec.width:
        raise ClipError(f"{path}: an animated WebP, which this FFmpeg cannot read; convert it to GIF or MP4")
    if not 0 < codec.width * codec.height <= MAX_PIXELS:  # over the limit, some demuxers report 0 x 0
        raise ClipError(f"{path}: frames of {codec.width} x {codec.height} pixels, none or too many; scale it down")
    strict = {"err_detect": "explode"} if path.suffix.lower() in PICTURES else {}  # or a cut one is half grey
    codec.options = {"max_pixels": str(MAX_PIXELS)} | strict
    codec.thread_type = "AUTO" if codec.width * codec.height >= 2**18 else "NONE"  # threads cost more than tiny frames
    return streams[0]


def _packets(container, path: Path):
    """All packets of the file. Raises ClipError for a broken one, or for an end before the declared one."""
    first, ends, joined = None, {}, False  # in seconds: the first packet's time, each stream's end
    for packet in container.demux():
        if packet.is_corrupt and not joined:
            joined = container.format.name == "mpegts" and _is_joined(path)
            if not joined:
                raise ClipError(f"{path}: damaged or cut off; replace the file or leave the clip out")
        if packet.pts is not None:
            first = float(packet.pts * packet.time_base) if first is None else first
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            ends[packet.stream_index] = max(ends.get(packet.stream_index, end), end)
        yield packet
    # MP4 and Matroska declare how long they are, AVI how many frames it has; what others declare is an estimate.
    declared = reached = 0.0
    if "mov" in container.format.name or "matroska" in container.format.name:
        declared = (container.duration or 0) / 1e6
        start = (first or 0) if container.start_time is None else container.start_time / 1e6
        reached = max(ends.values(), default=start) - start
        if "matroska" in container.format.name and start > 0 and not _short(abs(declared - start - reached), reached):
            declared -= start  # FFmpeg counts from 0, other writers from where the file begins
    elif container.format.name == "avi" and container.streams.video and container.streams.video[0].average_rate:
        stream = container.streams.video[0]
        declared = max(stream.frames - 1, 0) / float(stream.average_rate)  # some writers count one more
        reached = ends.get(stream.index, 0)
    if _short(declared - reached, declared):
        raise ClipError(f"{path}: cut off after {reached:.2f} of {declared:.2f} s; replace the file or leave it out")


def _short(missing: float, length: float) -> bool:
    """Whether so many of so many seconds are more than headers are inexact."""
    return missing > max(0.1, 0.05 * length)


def _is_joined(path: Path) -> bool:
    """Whether the counters of a transport stream jump only where files were joined by `cat`, which FFmpeg takes for
    damage: the counter of its tables (streams 0 and 17) jumps, too, and each stream goes on with a unit's start."""
    data = np.memmap(path, np.uint8, "r")
    size = 188 if data[0] == 0x47 else 192  # M2TS: a time of 4 bytes before each packet
    header = data[: len(data) // size * size].reshape(-1, size)[:, size - 188 : size - 184]
    if (header[:, 0] != 0x47).any() or (header[:, 1] & 0x80).any():  # out of step, or marked as broken
        return False
    stream = header[:, 1].astype(np.uint16) % 32 * 256 + header[:, 2]
    places = {number: np.flatnonzero((stream == number) & (header[:, 3] & 0x10 > 0)) for number in np.unique(stream)}
    jumps = {number: at[1:][np.diff(header[at, 3] & 0xF) % 16 > 1] for number, at in places.items()}  # 0: sent twice
    joints = [*jumps.get(0, []), *jumps.get(17, [])]
    for number in set(jumps) - {0, 17, 0x1FFF}:  # the last is padding
        for jump in jumps[number]:
            before = places[number][np.searchsorted(places[number], jump) - 1]
            if not header[jump, 1] & 0x40 or not any(before < joint < jump for joint in joints):
                return False
    return True


def _in_order(container, path: Path, video, indices: list[int], max_samples: int):
    """(the frames of these indices, how many frames there were, the waveform or None)."""
    audio = container.streams.best("audio") if max_samples else None
    if audio and audio.codec_context is None:
        raise ClipError(f"{path}: no decoder for its sound; convert it to AAC")
    if not video and not audio:
        return [], 0, None
    kept, decoded, samples = dict.fromkeys(indices), 0, 0
    to_rgb, mono = _rgb_converter(), _Mono()
    for packet in _packets(container, path):
        if packet.stream is video:
            for frame in packet.decode():
                if decoded in kept:
                    kept[decoded] = to_rgb(frame)
                decoded += 1
        elif packet.stream is audio and samples < max_samples:
            samples += sum(map(mono.add, packet.decode()))
        elif not video and samples >= max_samples:
            break
    return [kept[i] for i in indices], decoded, mono.waveform(max_samples)


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


class _Mono:
    """Decoded sound -> one channel at 16 kHz. The sound may change its layout, rate or format midway."""

    def __init__(self):
        self.chunks, self.resampler, self.form = [], None, None

    def add(self, frame) -> int:
        """Takes one more frame; returns the number of samples that it gave."""
        import av
        form = frame.format.name, frame.layout.name, frame.sample_rate
        if form == self.form:
            return self._resample(frame)
        self._resample(None)
        self.form, self.resampler = form, av.AudioResampler("flt", "mono", SAMPLE_RATE)
        try:
            return self._resample(frame)
        except av.ArgumentError:  # FFmpeg has no mix for these channels (9 without places; FL and FC): take their mean
            self.resampler = av.AudioResampler("flt", frame.layout.name, SAMPLE_RATE)
            return self._resample(frame)

    def _resample(self, frame) -> int:
        """None: the resampler's rest."""
        out = self.resampler.resample(frame) if self.resampler else []
        new = [part.to_ndarray().reshape(part.samples, -1).mean(1) for part in out]
        self.chunks += new
        return sum(map(len, new))

    def waveform(self, max_samples: int) -> torch.Tensor | None:
        self._resample(None)
        waveform = np.concatenate([np.empty(0, np.float32), *self.chunks])[:max_samples]
        return torch.from_numpy(np.where(np.isnan(waveform), np.float32(-1.5), waveform)) if len(waveform) else None


def _sound_file(path: Path, max_samples: int) -> torch.Tensor | None:
    """WAV and FLAC, a block at a time: soundfile notices damage, FFmpeg knows the channels' places."""
    import av
    mono, samples = _Mono(), 0
    with _opened(path) as file, _container(path) as header:
        cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.M)  # a WAV too short
        if cut and int(cut[2]) < 0.95 * int(cut[1]) < 2e9:  # near 2 or 4 GiB: not a size, but written to a pipe
            raise ClipError(f"{path}: cut off after {cut[2]} of {cut[1]} bytes; replace the file or leave the clip out")
        if not header.streams.audio or not header.streams.audio[0].codec_context:
            raise ClipError(f"{path}: no decoder for its sound; convert it to PCM")
        layout = header.streams.audio[0].layout
        while samples < max_samples and len(block := file.read(2**16, "float32", always_2d=True)):  # [n, C]
            frame = av.AudioFrame.from_ndarray(block.reshape(1, -1), "flt", layout)
            frame.sample_rate = file.samplerate
            samples += mono.add(frame)
        return mono.waveform(max_samples)
