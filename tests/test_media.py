"""media.py and base/decode.py: the release's recorded vectors, every container and every odd clip, written here."""

import json
import struct
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from conftest import GOLDEN
from safetensors.torch import load_file

from erv_min import media
from erv_min.base import decode
from erv_min.base.errors import ClipError, SettingsError
from erv_min.media import load_clip, load_frames, load_waveform, log_mel, pixel_values, sample_frame_indices

MEDIA = GOLDEN / "media"


def grey(i: int) -> int:
    """The grey level that frame i of a written clip is filled with, apart from its bright upper left corner."""
    return 10 + (i * 7) % 200


def write_clip(path, n=12, size=(64, 48), fps=12, codec="libx264", preset="medium", sound="aac", seconds=1.0,
               rate=16000, layout="mono", pixels="yuv420p", gop=None, times=None, container=None, tags=None, start=0,
               rotate=0):
    """A clip of n grey frames (n = 0: none) and a 440 Hz tone of amplitude 0.5 (sound None: none)."""
    with av.open(str(path), "w", options=container or {}) as out:
        out.metadata.update(tags or {})
        if n:
            video = out.add_stream(codec, rate=fps, options={"preset": preset} if codec == "libx264" else {})
            video.width, video.height, video.pix_fmt = *size, pixels
            if gop:
                video.gop_size = gop
        if sound:
            audio = out.add_stream(sound, rate=rate, layout=layout)
        image = np.empty((size[1], size[0], 3), np.uint8)
        for i in range(n):
            image[:] = grey(i)
            image[: size[1] // 4, : size[0] // 4] = 250
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = times[i] if times else i
            packets = video.encode(frame)
            out.mux(shifted(packets, start, fps))
        if n:
            out.mux(shifted(video.encode(None), start, fps))
        if sound:
            tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
            step = 48000 if sound.startswith("pcm") else 960
            for at in range(0, len(tone), step):
                x = np.repeat(tone[None, at:at + step], len(audio.layout.channels), 0).astype(np.float32)
                frame = av.AudioFrame.from_ndarray(x, format="fltp", layout=layout)
                frame.sample_rate, frame.pts = rate, at
                out.mux(audio.encode(frame))
            out.mux(audio.encode(None))
    if rotate:
        turn(path, rotate)
    return path


MATRICES = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0), "hflip": (-1, 0, 0, 1),
            "vflip": (1, 0, 0, -1), "transpose": (0, 1, 1, 0), "antitranspose": (0, -1, -1, 0)}


def turn(path, how):
    """Writes a phone's display matrix (angles clockwise) into the header of an MP4 or MOV file."""
    data = bytearray(path.read_bytes())
    a, b, c, d = MATRICES[how]
    at = data.find(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, version 0's times and id, layer and volume
    data[at:at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def shifted(packets, start, fps):
    for packet in packets:
        ticks = round(start / fps / float(packet.time_base))
        packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
    return packets


def levels(frames) -> list[int]:
    """The grey level in the lower right of each frame."""
    return [round(f[-10:, -10:].float().mean().item()) for f in frames]


def near(frames, indices, tolerance=4) -> bool:
    return len(frames) == len(indices) and all(abs(a - grey(i)) <= tolerance for a, i in zip(levels(frames), indices))


def pitch(waveform) -> float:
    """The loudest frequency in Hz."""
    return torch.fft.rfft(waveform).abs()[1:].argmax().add(1).item() * 16000 / len(waveform)


# ---- the release's recorded vectors ---------------------------------------------------------------------------------

def test_frame_indices_match_the_release():
    for n_frames, by_k in json.loads((MEDIA / "frame_sample.json").read_text()).items():
        for k, expected in by_k.items():
            assert sample_frame_indices(int(n_frames), int(k)) == expected
    # by hand: 9 frames, 4 wanted: segments of 2, middles 1, 3, 5, 7
    assert sample_frame_indices(9, 4) == [1, 3, 5, 7]
    with pytest.raises(ValueError):
        sample_frame_indices(0, 4)


PREPROCESS = load_file(MEDIA / "preprocess.safetensors")


@pytest.mark.parametrize("name", sorted(k for k in PREPROCESS if k.startswith("pixel_values")))
def test_pixel_values_match_the_release(name):
    _, geometry, size, i = name.split(".")
    expected = PREPROCESS[name]
    got = pixel_values(PREPROCESS[f"frames.{i}"][: len(expected)], int(size), geometry)
    difference = (got - expected).abs()
    assert difference.max() <= 2 / 255 + 1e-3  # one level of 8 bits
    # stretch.56.1 (120 x 80) fits exactly with the vertical pass first, as Pillow 13 has it for frames that shrink more
    # in height; we start horizontally, as Pillow did in the release's time. All others fit.
    assert difference.mean() * 127.5 < (0.25 if name == "pixel_values.stretch.56.1" else 0.001)


@pytest.mark.parametrize("i", range(3))
def test_log_mel_matches_the_release(i):
    mel = log_mel(PREPROCESS[f"waveform.{i}"])
    assert mel.shape == (128, 3000) and mel.dtype == torch.float32
    torch.testing.assert_close(mel[:, :220], PREPROCESS[f"log_mel.{i}"], atol=2e-5, rtol=0)
    torch.testing.assert_close(mel[:, -1], PREPROCESS[f"log_mel_tail.{i}"], atol=2e-5, rtol=0)


def test_log_mel_of_silence_matches_the_release():
    torch.testing.assert_close(log_mel(torch.zeros(160000))[:, :4], PREPROCESS["log_mel_silence"], atol=2e-5, rtol=0)


def test_a_real_clip_matches_the_release():
    expected = load_file(MEDIA / "clip.safetensors")
    frames = load_frames(MEDIA / "clip.mp4", 8)
    assert frames.dtype == torch.uint8 and torch.equal(frames, expected["frames"])
    difference = (pixel_values(frames, 56, "pad") - expected["pixel_values"]).abs()
    assert difference.max() <= 2 / 255 + 1e-3 and difference.mean() * 127.5 < 0.001
    waveform, recorded = load_waveform(MEDIA / "clip.mp4"), expected["waveform"]
    assert waveform.dtype == torch.float32 and abs(len(waveform) - len(recorded)) <= 0.02 * len(recorded)
    # decord loses 17 samples after the first sound packet; up to there the samples are equal, and after it shifted
    torch.testing.assert_close(waveform[:360], recorded[:360], atol=2e-5, rtol=0)
    both = min(len(waveform), len(recorded)) - 517  # FFmpeg 9 leaves out what the encoder padded at the end
    assert torch.corrcoef(torch.stack([waveform[500 : 500 + both], recorded[517 : 517 + both]]))[0, 1] > 0.99
    torch.testing.assert_close(log_mel(recorded)[:, :240], expected["log_mel"], atol=2e-5, rtol=0)


# ---- pixel values and log-mel ---------------------------------------------------------------------------------------

def test_bicubic_weights_by_hand():
    # 4 -> 2: scale 2, first output centred at 1.0; distances of the inputs in output pixels 0.25, 0.25, 0.75, 1.25;
    # 1.5x^3 - 2.5x^2 + 1 gives 0.8671875, 0.8671875, 0.2265625; -0.5x^3 + 2.5x^2 - 4x + 2 gives -0.0703125; sum 1.89
    weights = torch.tensor([0.8671875, 0.8671875, 0.2265625, -0.0703125]) / 1.890625
    torch.testing.assert_close(media._bicubic(4, 2), torch.stack([weights, weights.flip(0)]))
    assert torch.equal(media._bicubic(5, 5), torch.eye(5))  # nothing to resize: nothing changes


def test_padding_is_grey_and_centred_and_stretching_fills():
    frames = torch.full((1, 20, 40, 3), 255, dtype=torch.uint8)
    padded = pixel_values(frames, 40, "pad")[0, 0]
    assert padded.shape == (40, 40) and padded[10:30].eq(1).all()
    torch.testing.assert_close(padded[:10], torch.full((10, 40), 127 / 255 * 2 - 1))
    torch.testing.assert_close(padded[30:], padded[:10])
    assert pixel_values(frames, 40, "stretch").eq(1).all()
    # an odd gap: floor((S - h) / 2) above, the rest below
    assert pixel_values(frames[:, :19], 40, "pad")[0, 0].eq(1).all(1).nonzero()[[0, -1], 0].tolist() == [10, 28]
    with pytest.raises(SettingsError, match="crop"):
        pixel_values(frames, 40, "crop")


def test_large_frames_go_through_one_by_one():
    frames = torch.randint(0, 256, (3, 1200, 2000, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pixel_values(frames, 24), torch.cat([pixel_values(f[None], 24) for f in frames]))


def test_log_mel_of_another_length():
    noise = torch.randn(20000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert log_mel(noise, 32, 100).shape == (32, 100)
    assert torch.equal(log_mel(noise, 32, 100), log_mel(noise[:16000], 32, 100))  # cut at 1 s
    # windows over padding are not computed; the same with the padding given, where they are
    assert torch.equal(log_mel(noise, 80, 300), log_mel(torch.nn.functional.pad(noise, (0, 28000)), 80, 300))
    assert log_mel(torch.zeros(0), 32, 100).eq(-1.5).all()  # log10(1e-10) = -10, (-10 + 4) / 4


def test_nan_becomes_minus_one_and_a_half(tmp_path):
    assert log_mel(torch.full((400,), float("nan")), 32, 100).eq(-1.5).all()
    sound = np.zeros(16000, np.float32)
    sound[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", sound, 16000, subtype="FLOAT")
    waveform = load_waveform(tmp_path / "nan.wav")
    assert waveform[100] == -1.5 and waveform[:100].eq(0).all() and waveform[101:].eq(0).all()


# ---- containers -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, options", [
    ("a.mp4", {}),
    ("a.mov", {"codec": "mjpeg", "pixels": "yuvj420p", "sound": "pcm_s16le"}),
    ("a.avi", {"codec": "mpeg4", "sound": "mp3"}),
    ("a.mkv", {"sound": "flac"}),
    ("a.webm", {"codec": "libvpx-vp9", "sound": "libopus", "rate": 48000}),
    ("a.gif", {"codec": "gif", "pixels": "rgb8", "sound": None}),
])
def test_containers(tmp_path, name, options):
    clip = write_clip(tmp_path / name, **options)
    frames = load_frames(clip, 4)
    assert frames.shape == (4, 48, 64, 3)
    assert near(frames, [1, 4, 7, 10], 20 if name == "a.gif" else 4)  # GIF has few colours
    if name == "a.gif":
        with pytest.raises(ClipError, match="has no sound"):
            load_waveform(clip)
    else:
        waveform = load_waveform(clip)
        assert abs(len(waveform) - 16000) < 1700  # encoders pad by up to a packet or two
        assert abs(pitch(waveform) - 440) < 2 and 0.45 < waveform[4000:12000].abs().max() < 0.55


@pytest.mark.parametrize("name", ["a.wav", "a.FLAC"])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_sound_files(tmp_path, name, rate):
    tone = 0.25 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)
    soundfile.write(tmp_path / name, np.stack([tone, tone], 1), rate)
    waveform = load_waveform(tmp_path / name)
    assert waveform.dtype == torch.float32 and abs(len(waveform) - 32000) <= 1 and abs(pitch(waveform) - 440) < 1
    assert abs(waveform[8000:24000].abs().max() - 0.25 * 2 * 0.7071) < 2e-3  # (L + R) * 0.7071, louder than the mean
    soundfile.write(tmp_path / name, tone, rate)
    assert abs(load_waveform(tmp_path / name)[8000:24000].abs().max() - 0.25) < 2e-3
    assert load_clip(tmp_path / name, "audio", n_mels=32, n_frames=100).audio.shape == (32, 100)
    with pytest.raises(ClipError, match="has no video"):
        load_frames(tmp_path / name, 4)


def one_after_the_other(channels: int) -> np.ndarray:
    """0.5 in one channel after the other, 1,600 samples each: [1600 * channels, channels]."""
    return np.repeat(np.eye(channels), 1600, 0) * 0.5


def weights(path) -> list[float]:
    """How much of each channel is in the mix."""
    return [round(part[800].item() / 0.5, 3) for part in load_waveform(path).split(1600)]


# The masks' channels in order, and what `ffmpeg -ac 1 -c:a pcm_f32le` (9.0.2) makes of them. FL FR BL BR SL SR: .707 or
# .5, FC: 1, LFE: 0. Without a mask ffmpeg takes the usual places of so many channels, and so it does if the mask has
# fewer (last row). The plain mean if ffmpeg refuses: no usual places (9), one side alone (FL FC).
MIXES = [
    (0x4, [1]), (0x8, [1]), (0x3, [.707, .707]), (0xC, [1, 0]), (0x7, [.707, .707, 1]), (0xB, [.707, .707, 0]),
    (0x103, [.707, .707, .5]), (0x33, [.707, .707, .5, .5]), (0x107, [.707, .707, 1, .5]),
    (0x3F, [.707, .707, 1, 0, .5, .5]), (0x60F, [.707, .707, 1, 0, .5, .5]), (0x63F, [.707, .707, 1, 0] + [.5] * 4),
    (0xFF, [.707, .707, 1, 0, .5, .5, .707, .707]), (0x2D63F, [.707, .707, 1, 0] + [.5] * 4 + [.707, .707, 0, 0]),
    (0, [.707, .707, 0]), (0, [.707, .707, 1, .5]), (0, [.707, .707, 1, .5, .5]), (0, [.707, .707, 1, 0] + [.5] * 4),
    (0, [.707, .707, 1, 0, .5, .5, .707, .707, .5, .5, .707, .707, 0, 0, 0, 0]), (0x3, [.707, .707, 1, .5]),
    (0, [.111] * 9), (0x5, [.5, .5])]


@pytest.mark.parametrize("mask, mix", MIXES)
def test_each_channel_of_a_wav_is_mixed_by_its_place(tmp_path, mask, mix):
    pcm = (one_after_the_other(len(mix)) * 32768).astype("<i2").tobytes()
    form = struct.pack("<HHIIHHHHI", 0xFFFE, len(mix), 16000, 32000 * len(mix), 2 * len(mix), 16, 22, 16, mask)
    form += bytes.fromhex("0100000000001000800000aa00389b71")  # PCM
    chunks = b"WAVEfmt " + struct.pack("<I", 40) + form + b"data" + struct.pack("<I", len(pcm)) + pcm
    (tmp_path / "a.wav").write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
    assert weights(tmp_path / "a.wav") == mix


def test_each_channel_of_a_flac_or_a_stream_is_mixed_by_its_place(tmp_path):
    """FLAC has places of its own for three channels and more; others stand in a tag, or in the container."""
    soundfile.write(tmp_path / "a.flac", one_after_the_other(3), 16000)
    assert weights(tmp_path / "a.flac") == [.707, .707, 1]
    with soundfile.SoundFile(tmp_path / "a.wav", "w", 16000, 1) as out:
        out.title = "cafXXX"
        out.write(one_after_the_other(1))
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes().replace(b"cafXXX", b"caf\xe9\xff\xfe"))
    assert weights(tmp_path / "a.wav") == [1]
    for name, codec in (("b.flac", "flac"), ("b.mov", "pcm_s16le")):
        with av.open(str(tmp_path / name), "w") as out:
            stream = out.add_stream(codec, rate=16000, layout="3.0(back)")
            samples = (one_after_the_other(3) * 32768).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), "s16", "3.0(back)")
            frame.sample_rate = 16000
            out.mux([*stream.encode(frame), *stream.encode(None)])
        assert weights(tmp_path / name) == [.707, .707, .5]


def test_sound_that_changes_layout_and_rate_midway(tmp_path):
    """Both halves, 0.5 in each channel: 0.5 of mono, 0.5 * 2 * 0.7071 of stereo."""
    halves = [write_clip(tmp_path / "1.ts", layout="mono", rate=16000),
              write_clip(tmp_path / "2.ts", layout="stereo", rate=44100)]
    (tmp_path / "a.ts").write_bytes(b"".join(half.read_bytes() for half in halves))
    waveform = load_waveform(tmp_path / "a.ts")
    assert len(waveform) == sum(len(load_waveform(half)) for half in halves)
    assert abs(waveform[4000:12000].abs().max() - 0.5) < 0.03 and abs(pitch(waveform) - 440) < 2
    assert abs(waveform[20000:28000].abs().max() - 0.7071) < 0.03


def test_stereo_in_a_clip_mixes_the_same_way(tmp_path):
    waveform = load_waveform(write_clip(tmp_path / "a.mkv", sound="flac", layout="stereo", rate=44100))
    assert abs(waveform[4000:12000].abs().max() - 0.7071) < 2e-3


def test_sound_is_decoded_up_to_where_the_log_mel_ends(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", n=30, seconds=2.5, rate=44100)
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-1, 1, 100000), 44100)
    for path in (clip, tmp_path / "a.wav"):
        assert torch.equal(load_clip(path, "audio", n_frames=100).audio, log_mel(load_waveform(path), n_frames=100))


# ---- odd clips ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_odd_sizes(tmp_path, name):
    clip = write_clip(tmp_path / name, size=(63, 47), pixels="yuv444p")
    assert load_frames(clip, 4).shape == (4, 47, 63, 3)
    assert load_clip(clip, "video", 4, 48).video.shape == (4, 3, 48, 48)


# where the upper left corner belongs, as ffmpeg 9.0.2 shows it; the first four keep 64 x 48
CORNERS = {0: (0, 0), "hflip": (0, -1), "vflip": (-1, 0), 180: (-1, -1),
           "transpose": (0, 0), 90: (0, -1), 270: (-1, 0), "antitranspose": (-1, -1)}


@pytest.mark.parametrize("how", CORNERS)
def test_a_turned_or_mirrored_clip_stands_as_ffmpeg_shows_it(tmp_path, how):
    frames = load_frames(write_clip(tmp_path / "a.mp4", sound=None, rotate=how), 4)
    assert frames.shape[1:3] == ((48, 64) if how in list(CORNERS)[:4] else (64, 48))
    bright = frames[0, :, :, 0] > 200
    assert bright[CORNERS[how]] and bright.sum() < 0.1 * bright.numel()


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.gif", "gif")])
def test_one_frame(tmp_path, name, codec):
    options = {"pixels": "rgb8", "sound": None} if codec == "gif" else {}
    assert near(load_frames(write_clip(tmp_path / name, n=1, codec=codec, **options), 8), [0] * 8, 20)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rate_counts_frames(tmp_path, name):
    times = [0, 1, 2, 3, 10, 11, 12, 30, 31, 60, 61, 62]
    assert near(load_frames(write_clip(tmp_path / name, times=times), 4), [1, 4, 7, 10])


def test_frames_hidden_by_an_edit_list(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", n=15, start=-6, sound=None)  # times before 0: kept in the file, never shown
    with av.open(str(clip)) as container:
        assert container.streams.video[0].frames == 15 and len(list(container.decode(video=0))) == 9
    assert near(load_frames(clip, 4), [7, 9, 11, 13])  # of 9 frames, from the 6th on: 1, 3, 5, 7
    clip = write_clip(tmp_path / "b.mp4", n=60, start=-1, sound=None)  # 59 frames, from the second on: 7, 22, 36, 51
    assert near(load_frames(clip, 4), [8, 23, 37, 52], 2)


@pytest.mark.parametrize("from_first", [False, True])
def test_a_matroska_file_need_not_begin_at_0(tmp_path, from_first):
    """Its duration counts from 0 (FFmpeg's, 8 s) or from the first frame (others', 4 s); a cut one is found out."""
    path = write_clip(tmp_path / "a.mkv", n=48, start=48, sound=None, gop=6)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3
    assert struct.unpack(">d", data[at:at + 8]) == (8000,)
    if from_first:
        data[at:at + 8] = struct.pack(">d", 4000)
    path.write_bytes(data)
    assert near(load_frames(path, 4), sample_frame_indices(48, 4))
    for part in (0.5, 0.85):
        path.write_bytes(data[:int(part * len(data))])
        fails(path, "cut off")


def test_transport_streams_joined_by_cat(tmp_path):
    """FFmpeg marks packets at the joint as corrupt, since counters jump there; packets that are missing are damage."""
    parts = [write_clip(tmp_path / f"{n}.ts", n=n) for n in (12, 20, 7)]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with av.open(str(joined)) as container:
        assert any(packet.is_corrupt for packet in container.demux())
    assert torch.equal(load_frames(joined, 39).sort(0)[0], torch.cat([load_frames(part, n) for part, n in zip(
        parts, (12, 20, 7))]).sort(0)[0])
    assert len(load_waveform(joined)) == sum(len(load_waveform(part)) for part in parts)
    data = bytearray(joined.read_bytes())
    middles = [at for at in range(0, len(data), 188) if not data[at + 1] & 0x40]  # packets in the middle of a unit
    for at in middles[::len(middles) // 5]:
        for put in (b"", bytes(188)):
            joined.write_bytes(data[:at] + put + data[at + 188:])
            with pytest.raises(ClipError, match="joined.ts"):
                load_clip(joined)


def test_sound_that_begins_late_is_placed_at_0(tmp_path):
    with av.open(str(write_clip(tmp_path / "a.mkv", sound="flac"))) as whole, \
            av.open(str(tmp_path / "b.mkv"), "w") as out:
        streams = {stream: out.add_stream_from_template(stream) for stream in whole.streams}
        for packet in whole.demux():
            if packet.dts is not None:
                late = 500 if packet.stream.type == "audio" else 0  # ms
                packet.pts, packet.dts = packet.pts + late, packet.dts + late
                packet.stream = streams[packet.stream]
                out.mux(packet)
    with av.open(str(tmp_path / "b.mkv")) as late:
        assert next(late.demux(late.streams.audio[0])).pts == 500
    assert torch.equal(load_waveform(tmp_path / "b.mkv"), load_waveform(tmp_path / "a.mkv"))


def test_sound_longer_and_shorter_than_the_picture(tmp_path):
    for i, (n, seconds) in enumerate([(12, 4.0), (48, 1.0)]):
        for name in (f"{i}.mp4", f"{i}.mkv", f"{i}.avi"):
            clip = write_clip(tmp_path / name, n=n, seconds=seconds, codec="mpeg4", sound="mp3")
            assert near(load_frames(clip, 4), sample_frame_indices(n, 4))
            assert abs(len(load_waveform(clip)) - 16000 * seconds) < 2500
            assert load_clip(clip, num_frames=4, n_frames=200).audio.shape == (128, 200)


def test_sound_beyond_the_log_mel_is_not_decoded(tmp_path, monkeypatch):
    clip, decoded, real = write_clip(tmp_path / "a.mp4", n=24, seconds=20), [], decode._mono
    monkeypatch.setattr(decode, "_mono", lambda frames, most: decoded.extend(frames) or real(frames, most))
    load_clip(clip, "video_audio", 4, n_frames=100)
    assert len(decoded) <= 17000 / 1024 + 2  # packets of 1024 samples


def test_a_size_that_changes_midway_is_scaled_to_the_first(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        video = out.add_stream("mjpeg", rate=4)
        other = av.CodecContext.create("mjpeg", "w")
        other.time_base = Fraction(1, 4)
        for codec, size, at in ((video, (64, 48), 0), (other, (32, 24), 4)):
            codec.width, codec.height, codec.pix_fmt = *size, "yuvj420p"
            for i in range(at, at + 4):
                frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey(i), np.uint8), format="rgb24")
                frame.pts = i
                for packet in codec.encode(frame):
                    packet.stream = video
                    out.mux(packet)
    frames = load_frames(tmp_path / "a.mkv", 8)
    assert frames.shape == (8, 48, 64, 3) and near(frames, range(8))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.gif", "a.wav"])
def test_a_clip_without_sound_is_heard_as_silence_or_is_an_error(tmp_path, name):
    """Divergence 19: "hear" gives what the release hears, 10 s of zeros, and says so; "error" names the option."""
    path = tmp_path / name
    if name == "a.wav":
        soundfile.write(path, np.zeros(0), 16000)  # a sound file may hold no sample
    else:
        write_clip(path, sound=None, **({"codec": "gif", "pixels": "rgb8"} if name == "a.gif" else {}))
    for call in (lambda: load_waveform(path), lambda: load_clip(path, "audio", silence="error")):
        with pytest.raises(ClipError, match=f"{name}: has no sound.*--silence"):
            call()
    heard = load_clip(path, "audio")
    assert heard.silent and torch.equal(heard.audio, log_mel(torch.zeros(160000))) and heard.audio.eq(-1.5).all()
    if name != "a.wav":
        both = load_clip(path, "video_audio", 4, silence="hear")
        assert both.silent and torch.equal(both.audio, heard.audio) and len(both.video) == 4
        assert load_clip(path, "video", 4, silence="error").silent is False  # its sound was not asked for


def test_a_clip_whose_picture_or_sound_is_taken_away(tmp_path):
    """Black frames (-1) between the grey margins of "pad"; log10(1e-10) is -10, (-10 + 4) / 4 = -1.5; the other
    modality is the same to the last bit."""
    write_clip(tmp_path / "a.mp4")  # 64 x 48
    whole, black, mute = (load_clip(tmp_path / "a.mp4", num_frames=4, image_size=64, n_frames=200, without=x)
                          for x in ("", "video", "audio"))
    assert (black.video[..., 8:56, :] == -1).all() and not (whole.video[..., 8:56, :] == -1).any()
    assert torch.equal(black.video[..., :8, :], whole.video[..., :8, :]) and torch.equal(black.audio, whole.audio)
    assert (mute.audio == -1.5).all() and (whole.audio > -1.5).any() and torch.equal(mute.video, whole.video)
    assert not mute.silent  # the file has sound: nothing to warn of


def test_a_quiet_clip_is_not_a_clip_without_sound(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    clip = load_clip(tmp_path / "a.wav", "audio", silence="error")
    assert not clip.silent and clip.audio.eq(-1.5).all()


def test_cover_art_is_no_video(tmp_path):
    from av.stream import Disposition
    with av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as out:
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 64, 64, "yuvj420p", Disposition.attached_pic.value
        audio = out.add_stream("aac", rate=16000, layout="mono")
        out.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        out.mux(cover.encode(None))
        for at in range(0, 16000, 1000):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, at
            out.mux(audio.encode(frame))
        out.mux(audio.encode(None))
    with av.open(str(tmp_path / "a.m4a")) as container:
        assert len(container.streams.video) == 1
    with pytest.raises(ClipError, match="has no video"):
        load_frames(tmp_path / "a.m4a", 4)
    assert abs(len(load_waveform(tmp_path / "a.m4a")) - 16000) < 1700


def test_tags_in_another_encoding_and_names_like_protocols(tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "http:a b%20.mp4", tags={"title": "cafXXX"})
    data = clip.read_bytes()
    assert b"cafXXX" in data
    clip.write_bytes(data.replace(b"cafXXX", b"caf\xe9\xff\xfe"))
    assert near(load_frames(clip, 4), [1, 4, 7, 10])
    monkeypatch.chdir(tmp_path)
    assert near(load_frames("http:a b%20.mp4", 4), [1, 4, 7, 10])


def write_pictures(folder, names, size=(64, 48)):
    """Grey frames as `write_clip`'s, in the order of `names`."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        codec = {"jpg": "mjpeg", "jpeg": "mjpeg", "png": "png"}[name.rsplit(".")[-1].lower()]
        with av.open(str(folder / name), "w", format="image2", options={"update": "1"}) as out:
            stream = out.add_stream(codec, rate=1)
            stream.width, stream.height, stream.pix_fmt = *size, "yuvj420p" if codec == "mjpeg" else "rgb24"
            image = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey(i), np.uint8), format="rgb24")
            out.mux([*stream.encode(image), *stream.encode(None)])
    return folder


@pytest.mark.parametrize("names", [[f"{i + 1}.jpg" for i in range(12)], [f"{i:05}.PNG" for i in range(12)]])
def test_a_folder_of_frames_is_a_clip(tmp_path, names):
    """In natural order, without sound; what macOS and Windows leave there is none of them."""
    folder = write_pictures(tmp_path / "00001", names)
    (folder / "._1.jpg").write_bytes(b"\0\5\x16\7"), (folder / "Thumbs.db").write_bytes(b"")
    assert decode.frame_files(folder) and not decode.frame_files(tmp_path)
    frames = load_frames(folder, 4)
    assert frames.shape == (4, 48, 64, 3) and near(frames, [1, 4, 7, 10], 1)
    assert near(load_frames(folder, 16), sample_frame_indices(12, 16), 1)  # more than there are
    clip = load_clip(folder, "video_audio", 4, 48)
    assert clip.silent and torch.equal(clip.video, pixel_values(frames, 48)) and clip.audio.eq(-1.5).all()
    with pytest.raises(ClipError, match="00001: has no sound"):
        load_clip(folder, silence="error")
    write_pictures(folder, names[:1], (32, 24))
    assert load_frames(folder, 12).shape == (12, 24, 32, 3)  # scaled to the first
    cut = folder / names[1]
    cut.write_bytes(cut.read_bytes()[:-40])
    with pytest.raises(ClipError, match=names[1]):
        load_frames(folder, 12)


# ---- load_clip ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])  # with and without a declared number of frames
def test_load_clip_is_its_parts(tmp_path, name):
    path = write_clip(tmp_path / name, n=20, seconds=1.5)
    frames, waveform = load_frames(path, 4), load_waveform(path)
    clip = load_clip(str(path), "video_audio", 4, 48, 32, 100, "stretch")
    assert clip.video.shape == (4, 3, 48, 48) and clip.audio.shape == (32, 100)
    assert torch.equal(clip.video, pixel_values(frames, 48, "stretch"))
    assert torch.equal(clip.audio, log_mel(waveform, 32, 100))
    with torch.autocast("cpu", torch.bfloat16):  # as inside a training step
        again = load_clip(str(path), "video_audio", 4, 48, 32, 100, "stretch")
    assert torch.equal(again.video, clip.video) and torch.equal(again.audio, clip.audio)
    assert load_clip(path, "video", 4, 48).audio is None and load_clip(path, "audio").video is None
    assert torch.equal(load_clip(path, "video", 4, 48).video, pixel_values(frames, 48, "pad"))
    with pytest.raises(SettingsError, match="smell"):
        load_clip(path, "smell")


def test_a_toy_clip_is_opened_once(tmp_path, monkeypatch):
    path, opened, real = write_clip(tmp_path / "a.mp4"), [], av.open
    monkeypatch.setattr(av, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    load_clip(path, "video_audio", 4, 48, 32, 100)
    assert len(opened) == 1


# ---- long clips -----------------------------------------------------------------------------------------------------

def test_a_clip_of_an_hour_in_bounded_memory(tmp_path):
    # All frames would be 207 MB, all the sound 230 MB. At 1 frame a second, so that writing it takes a moment.
    path = write_clip(tmp_path / "hour.mov", n=3600, fps=1, size=(160, 120), preset="ultrafast", gop=60,
                      sound="pcm_s16le", seconds=3600, rate=8000)
    code = (f"import resource, sys; from erv_min.media import load_clip; import av, torch\n"
            f"load_clip({str(tmp_path / 'warm.mp4')!r}, num_frames=8)\n"
            f"before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"clip = load_clip({str(path)!r}, num_frames=8)\n"
            f"assert clip.video.shape == (8, 3, 224, 224) and clip.audio.shape == (128, 3000)\n"
            f"print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)")
    write_clip(tmp_path / "warm.mp4", n=30, size=(160, 120), seconds=40)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 60, f"{result.stdout.strip()} MB more than for a clip of 30 frames"
    assert near(load_frames(path, 8), sample_frame_indices(3600, 8))


def test_only_the_wanted_frames_are_kept(tmp_path, monkeypatch):
    path, converted, real = write_clip(tmp_path / "a.mp4", n=400, sound=None), [], decode._rgb_converter

    def counting():
        to_rgb = real()
        return lambda frame: [converted.append(1), to_rgb(frame)][1]
    monkeypatch.setattr(decode, "_rgb_converter", counting)
    load_frames(path, 8)
    assert len(converted) == 8


# ---- files that cannot be decoded -----------------------------------------------------------------------------------

def fails(path, match=None) -> str:
    """Every entry point raises ClipError naming the file."""
    for call in (lambda: load_clip(path, num_frames=4), lambda: load_frames(path, 4)):
        with pytest.raises(ClipError, match=match) as error:
            call()
        assert str(path) in str(error.value)
    return str(error.value)


def test_what_is_no_clip(tmp_path):
    fails(tmp_path / "missing.mp4", "no such file")
    fails(tmp_path, "not a file")
    for name, content, what in (("a.mp4", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
                                ("._a.mp4", b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(4000), "macOS")):
        (tmp_path / name).write_bytes(content)
        fails(tmp_path / name, what)
    animation = struct.pack("<4sI4s4sI10s", b"RIFF", 62, b"WEBP", b"VP8X", 10, b"\2\0\0\0\x3f\0\0\x2f\0\0")
    animation += struct.pack("<4sI6s4sI16s", b"ANIM", 6, bytes(6), b"ANMF", 16, bytes(16))
    (tmp_path / "a.webp").write_bytes(animation)
    if "webp_anim" not in av.codecs_available:  # FFmpeg 9 reads them
        fails(tmp_path / "a.webp", "animated WebP")
    for name in ("a.mp4", "a.avi", "a.mkv", "a.gif"):
        for content in (b"", b"\0" * 5000, b"not a clip\n" * 500, np.random.default_rng(0).bytes(5000)):
            (tmp_path / name).write_bytes(content)
            fails(tmp_path / name)
            with pytest.raises(ClipError):
                load_waveform(tmp_path / name)
    for name in ("a.wav", "a.flac"):
        for content in (b"", b"not a sound" * 100):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ClipError, match=name):
                load_waveform(tmp_path / name)


@pytest.mark.parametrize("name, options", [
    ("a.mp4", {}), ("a.mp4", {"container": {"movflags": "faststart"}}), ("a.mkv", {}),
    ("a.webm", {"codec": "libvpx-vp9", "sound": "libopus", "rate": 48000}),
    ("a.avi", {"codec": "mpeg4", "sound": "mp3"}), ("a.avi", {"sound": "pcm_s16le", "layout": "stereo"})])
def test_a_cut_clip_is_not_silently_shortened(tmp_path, name, options):
    path = write_clip(tmp_path / name, n=48, seconds=4, **options)
    data = path.read_bytes()
    for part in (0.1, 0.3, 0.5, 0.7, 0.85):
        path.write_bytes(data[:int(part * len(data))])
        fails(path)
    with av.open(str(write_clip(tmp_path / name, n=48, seconds=4, **options))) as container:
        ends = [p.pos + p.size for p in container.demux() if p.pos]
    path.write_bytes(data[:sorted(ends)[len(ends) // 2]])  # exactly between two packets
    fails(path)


def test_half_a_last_frame_is_not_used(tmp_path):
    path = write_clip(tmp_path / "a.mov", codec="mjpeg", pixels="yuvj420p", sound=None,
                      container={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-100])
    fails(path, "damaged or cut off")


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_sound_file_cut_off(tmp_path, name):
    path = tmp_path / name
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 64000), 16000)
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(ClipError, match=name):
        load_waveform(path)


def test_a_wav_from_a_pipe_has_no_length_to_hold_it_to(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(64000), 16000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[data.find(b"data") + 4:data.find(b"data") + 8] = b"\xff" * 4
    (tmp_path / "a.wav").write_bytes(data)
    assert len(load_waveform(tmp_path / "a.wav")) == 64000


def test_damage_in_the_middle(tmp_path):
    path = write_clip(tmp_path / "a.mp4", n=60, sound=None, container={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux() if p.size]
    position, size = packets[0]
    data[position:position + size] = bytes(size)
    path.write_bytes(data)
    fails(path)


def test_huge_declared_frames_are_refused(tmp_path):
    header = struct.pack("<6sHHBBB", b"GIF89a", 16000, 16000, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    image = b"," + struct.pack("<HHHHB", 0, 0, 16000, 16000, 0) + b"\x02\x02D\x01\x00;"
    (tmp_path / "a.gif").write_bytes(header + image)
    fails(tmp_path / "a.gif", "pixels")


def test_libraries_errors_become_clip_errors(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4")
    for error in (MemoryError(), OSError(5, "Input/output error"), av.error.InvalidDataError(1, "bad data")):
        def broken(*_, error=error):
            raise error
        monkeypatch.setattr(decode, "_rgb_converter", lambda: broken)
        fails(path, "cannot be decoded")


def test_an_odd_gap_is_wider_on_the_right_and_at_the_bottom():
    """White frames of 5 x 6 and 6 x 5 in a square of 6, which no resize changes: the grey line is the last one."""
    grey = (127 / 255 - 0.5) / 0.5
    for shape, last in (((1, 6, 5, 3), (..., slice(5, 6))), ((1, 5, 6, 3), (..., slice(5, 6), slice(None)))):
        x = pixel_values(torch.full(shape, 255, dtype=torch.uint8), 6)
        torch.testing.assert_close(x[last], torch.full_like(x[last], grey))
        assert (x == 1).sum() == 3 * 5 * 6
