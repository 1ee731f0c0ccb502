"""Containers, packets, damage: a file -> the chosen frames and the sound. Skip it at first reading.

PyAV decodes video and the sound in it, soundfile WAV and FLAC; imported inside functions: a GPU machine may lack both.
- Memory is bounded: only the chosen frames are kept, and sound is decoded up to `max_samples`.
- Rotation marks of phones are applied, as decord does, so that a person stands upright; mirror marks are not.
- Nothing is made up: a clip that is damaged, or cut off before the end it declares, raises ClipError. 5% (or 0.1 s)
  may be missing at the end, because headers are that inexact. What cannot be seen: a cut GIF (it declares no length),
  and damage that a decoder conceals.
"""

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
        declared = (container.duration or 0) / 1e6
        reached = max(seconds.values(), default=0) - (container.start_time or 0) / 1e6
    elif container.format.name == "avi" and container.streams.video and container.streams.video[0].average_rate:
        stream = container.streams.video[0]
        declared = max(stream.frames - 1, 0) / float(stream.average_rate)  # some writers count one more
        reached = seconds.get(stream.index, 0)
    if declared - reached > max(0.1, 0.05 * declared):
        raise ClipError(f"{path}: cut off after {reached:.2f} of {declared:.2f} s; replace the file or leave it out")


def _in_order(container, path: Path, video, indices: list[int], max_samples: int):
    """(the frames of these indices, how many frames there were, the waveform or None)."""
    import av
    audio = container.streams.best("audio") if max_samples else None
    if audio and audio.codec_context is None:
        raise ClipError(f"{path}: no decoder for its sound; convert it to AAC")
    if not video and not audio:
        return [], 0, None
    kept, decoded, chunks, samples = dict.fromkeys(indices), 0, [], 0
    to_rgb, resampler = _rgb_converter(), av.AudioResampler("fltp", "mono", SAMPLE_RATE)
    for packet in _packets(container, path):
        if packet.stream is video:
            for frame in packet.decode():
                if decoded in kept:
                    kept[decoded] = to_rgb(frame)
                decoded += 1
        elif packet.stream is audio and samples < max_samples:
            samples += sum(_resample(resampler, frame, chunks) for frame in packet.decode())
        elif not video and samples >= max_samples:
            break
    return [kept[i] for i in indices], decoded, _waveform(chunks, resampler, max_samples)


def _rgb_converter():
    """A function: decoded frame -> upright uint8 [H, W, 3], scaled to the first one's size if the clip changes it."""
    import av
    reformatter, size = av.video.reformatter.VideoReformatter(), None  # one per clip: it costs more than a small frame
    threads = {"threads": 1} if int(av.__version__[:2]) >= 17 else {}  # the default is a pool of threads from 17 on

    def to_rgb(frame) -> np.ndarray:
        nonlocal size
        size = size or (frame.width, frame.height)
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
    waveform = np.concatenate([np.empty(0, np.float32), *chunks])[:max_samples]
    return torch.from_numpy(np.where(np.isnan(waveform), np.float32(-1.5), waveform)) if len(waveform) else None


def _sound_file(path: Path, max_samples: int) -> torch.Tensor | None:
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
