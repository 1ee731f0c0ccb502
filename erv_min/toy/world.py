"""The small world on disk: clips with an emotion, the annotation files of real data sets, tokenizers. Offline, by seed.

`build_world(folder, WorldSettings(...))` draws each clip's face and voice around its emotion's prototype (weak in one
modality in 20% of the clips, contradicting in a few), renders MP4 files in worker processes, and writes
clip/<number>.mp4, DFEW's single_{train,test,tune}set_5.csv, train.json (the released training JSON for SFT, only
loosely tied to the labels), pretrain.json (captions), reading.jsonl (text alone), erv_{train,valid}.jsonl, params.jsonl
(the generator's truth), tokenizers/{lm,text_gate,erv} and at last world.json.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from erv_min.base.errors import SettingsError
from erv_min.base.files import atomic_write, read_json, write_json, write_jsonl
from erv_min.base.progress import Progress
from erv_min.prompts import QUESTION, REASONING_SUFFIX, sft_target
from erv_min.toy import text
from erv_min.toy.render import FACE, HAIRS, ONE_SIDED, ROOMS, SHIRTS, SKINS, VOICE, Look, draw, encode, voice
from erv_min.toy.text import EMOTIONS
from erv_min.toy.vocab import write_tokenizers

VERSION = 10  # of what a seed gives; raise it when rendering, grammar or files change
SPLITS = ("train", "test", "tune", "pretrain")
FIRST_NUMBER = 10_001  # five digits without leading zeros, however a reader spells them

# Class shares of the human-annotated pairs: few of disgust, fear and neutral, as in table 5's EMER and MERR rows.
HUMAN_SHARES = (0.24, 0.24, 0.05, 0.27, 0.13, 0.02, 0.05)
COMPLEMENT = ("disgust", "fear", "neutral")  # classes of section 3.2's complement set that this world has

# Expression and voice of each emotion, in the order of FACE and VOICE: (face [7], voice [6]). Neutral is not 0: there
# every weak expression lies, so that its clips would be taken for all others.
PROTOTYPES = {
    "happy": ((0.9, 0.1, 0.0, 0.15, -0.3, 0.0, 0.0), (0.5, 0.8, 0.0, 0.4, -0.3, 0.0)),
    "sad": ((-0.7, 0.0, -0.8, 0.0, -0.4, 0.0, 0.15), (-0.6, -0.7, 0.3, -0.6, -0.4, 0.0)),
    "neutral": ((0.0, 0.0, 0.0, 0.4, -0.35, 0.0, 0.0), (0.0, -0.5, 0.0, -0.1, 0.35, 0.0)),
    "angry": ((-0.45, 0.25, 0.9, -0.7, 0.15, 0.0, 0.1), (-0.2, 0.7, 0.0, 0.9, -0.2, 0.4)),
    "surprise": ((0.0, 0.9, -0.1, 0.9, 0.8, 0.0, 0.0), (0.8, -0.1, 0.0, 0.5, 0.9, 0.0)),
    "disgust": ((-0.5, 0.1, 0.4, -0.45, -0.6, 0.9, 0.0), (-0.7, -0.3, 0.0, 0.2, -0.7, 0.8)),
    "fear": ((-0.3, 0.45, -0.7, 0.6, 0.7, 0.0, 0.8), (0.6, 0.6, 0.9, -0.5, 0.1, 0.0)),
}


@dataclass(frozen=True)
class WorldSettings:
    """Sizes and difficulty of a world; the default is the one that the stage scripts run on."""

    seed: int = 0
    train: int = 2000  # clips with a label, for GRPO; the first `sft_clips` of them also have explanations
    test: int = 400
    tune: int = 0  # clips to tune settings on, apart from the test clips
    pretrain: int = 2000  # clips with captions, for the towers and the language model
    weak: float = 0.2  # share of clips with a weak face, and of clips with a weak voice
    conflict: float = 0.05  # share of clips in which face or voice shows another emotion
    noise: float = 0.16  # standard deviation of every parameter around its prototype
    sft_clips: int = 2000
    resamples: int = 3  # explanations per clip in train.json
    captions: int = 2  # captions per clip in pretrain.json
    unrelated: int = 1  # explanations of any emotion per clip in pretrain.json
    reading: int = 4000  # explanations without a clip in reading.jsonl
    percept_noise: float = 0.2  # what train.json takes a clip for is a random emotion, fixed for the clip
    about_noise: float = 0.65  # an explanation in train.json is about a random emotion, not about what is perceived
    reads: float = 0.25  # an answer in train.json is what its explanation says, else what is perceived
    sentence_noise: float = 0.1  # an emotional sentence is about another emotion
    erv_train: int = 4000
    erv_valid: int = 500
    erv_noise: float = 0.12  # wrong first labels in the verifier's training pairs


@dataclass(frozen=True)
class ClipSpec:
    """One clip's truth: all that rendering needs, and what params.jsonl holds."""

    number: int
    split: str
    label: str
    face_shows: str  # differs from label in a conflicting clip
    voice_shows: str
    face: tuple[float, ...]  # in the order of FACE
    voice: tuple[float, ...]  # in the order of VOICE
    look: Look


def generator(settings: WorldSettings, purpose: str, index: int = 0) -> np.random.Generator:
    """Random numbers of their own for each purpose and clip, so that a change of one leaves the others alone."""
    stream = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big")
    return np.random.default_rng([settings.seed, stream, index])


def sample_clip(settings: WorldSettings, split: str, index: int, number: int) -> ClipSpec:
    """The clip `index` of `split`: a function of its arguments, whatever the sizes of the splits."""
    rng = generator(settings, f"clip/{split}", index)
    label = text.pick(rng, EMOTIONS)
    shows = [label, label]  # face, voice
    if rng.random() < settings.conflict:
        shows[int(rng.integers(2))] = text.pick(rng, [e for e in EMOTIONS if e != label])
    values = []
    for modality, (names, emotion) in enumerate(zip((FACE, VOICE), shows)):
        weak = rng.random() < settings.weak
        strength = rng.uniform(0.0, 0.35) if weak else rng.uniform(0.6, 1.0)
        noisy = strength * np.array(PROTOTYPES[emotion][modality]) + settings.noise * rng.standard_normal(len(names))
        lowest = [0.0 if name in ONE_SIDED else -1.0 for name in names]
        values.append(tuple(round(float(v), 4) for v in np.clip(noisy, lowest, 1.0)))
    woman = bool(rng.random() < 0.5)
    look = Look(woman, text.pick(rng, list(SHIRTS)), text.pick(rng, list(HAIRS)),
                woman,  # long hair: a model goes by its length, and would miss what goes against it
                bool(rng.random() < 0.25), text.pick(rng, ROOMS), int(rng.integers(len(SKINS))))
    return ClipSpec(number, split, label, *shows, *values, look)


def sample_clips(settings: WorldSettings) -> list[ClipSpec]:
    """Every clip of the world, in the order of their numbers: train, test, tune, pretrain."""
    sizes = {split: getattr(settings, split) for split in SPLITS}
    if min(sizes.values()) < 0 or not 0 < sum(sizes.values()) < 90_000:  # numbers of five digits
        raise SettingsError(f"a world holds 1 to 89,999 clips, not {sizes}")
    places = [(split, index) for split, size in sizes.items() for index in range(size)]
    return [sample_clip(settings, *place, number) for number, place in enumerate(places, FIRST_NUMBER)]


def render_clip(folder: Path, settings: WorldSettings, clip: ClipSpec) -> None:
    rng = generator(settings, f"render/{clip.split}", clip.number)
    content = encode(draw(np.array(clip.face), clip.look, rng), voice(np.array(clip.voice), clip.look, rng))
    (folder / "clip" / f"{clip.number}.mp4").write_bytes(content)


def build_world(folder: str | Path, settings: WorldSettings = WorldSettings(), workers: int = 2) -> Path:
    """Renders the world into `folder` and returns it; reuses a complete one. Raises SettingsError if the folder holds
    something else, or if the sizes make no sense."""
    folder, clips = Path(folder), sample_clips(settings)
    about = {"version": VERSION, "settings": asdict(settings), "clips": len(clips)}
    done, unfinished = folder / "world.json", folder / "world.partial.json"  # the second becomes the first
    if done.exists() and read_json(done) == about:
        return folder
    if done.exists() or folder.exists() and any(folder.iterdir()) and not unfinished.exists():
        raise SettingsError(f"{folder}: holds a world of other settings or of another version, or files that are not a "
                            "world's; name another folder, or delete this one")
    write_json(unfinished, about)
    shutil.rmtree(folder / "clip", ignore_errors=True)  # of a stopped run
    (folder / "clip").mkdir()
    render = partial(render_clip, folder, settings)
    with (ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
          Progress("clips are rendered", len(clips), "clip") as progress):
        for _ in pool.map(render, clips, chunksize=25) if workers > 1 else map(render, clips):
            progress.add()
    write_annotations(folder, clips, settings)
    unfinished.replace(done)
    return folder


def write_annotations(folder: Path, clips: list[ClipSpec], settings: WorldSettings) -> None:
    """All files but the clips and world.json."""
    by_split = {split: [c for c in clips if c.split == split] for split in SPLITS}
    for split in ("train", "test", *(["tune"] if by_split["tune"] else [])):
        rows = [f"{c.number},{EMOTIONS.index(c.label) + 1}\n" for c in by_split[split]]
        atomic_write(folder / f"single_{split}set_5.csv", "".join(["video_name,label\n", *rows]))
    write_jsonl(folder / "params.jsonl", map(asdict, clips))
    write_json(folder / "train.json", training_json(by_split["train"][:settings.sft_clips], sft_targets, settings))
    write_json(folder / "pretrain.json", training_json(by_split["pretrain"], captions, settings))
    rng = generator(settings, "reading")
    told = [any_explanation(rng, text.pick(rng, clips), settings) for _ in range(settings.reading)]
    write_jsonl(folder / "reading.jsonl", [{"explanation": said, "emotion": emotion} for said, emotion in told])
    train, valid = erv_pairs(by_split["train"] or clips, settings)
    write_jsonl(folder / "erv_train.jsonl", [{k: v for k, v in row.items() if k != "truth"} for row in train])
    write_jsonl(folder / "erv_valid.jsonl", valid)
    sentences = " ".join([*text.grammar(True), *text.grammar(False)])  # all words that a policy may write
    spoken = [(sentences, emotion) for emotion in EMOTIONS]
    spoken += [told for clip in clips[:300] for told in captions(clip, settings)]
    write_tokenizers(folder / "tokenizers", [sft_target(*told) for told in spoken],
                     [row["text"] for row in train + valid])


def training_json(clips: list[ClipSpec], told_of: Callable, settings: WorldSettings) -> list[dict]:
    """The released training JSON: one item for each (explanation, answer) of `told_of`(clip, settings)."""
    return [{"video": f"clip/{clip.number}.mp4", "conversations": [
        {"from": "human", "value": f"<video>\n<audio>\n{QUESTION} {REASONING_SUFFIX}"},
        {"from": "gpt", "value": sft_target(*told)}]} for clip in clips for told in told_of(clip, settings)]


def sft_targets(clip: ClipSpec, settings: WorldSettings) -> Iterator[tuple[str, str]]:
    """An explanation, and an answer that follows from it in some and from the clip in the others.

    With the first way alone nothing could come apart, with the second alone SFT would not be coherent.
    """
    rng = generator(settings, "sft", clip.number)
    percept = text.pick(rng, EMOTIONS) if rng.random() < settings.percept_noise else clip.label
    for _ in range(settings.resamples):
        about = text.pick(rng, EMOTIONS) if rng.random() < settings.about_noise else percept
        answer = about if rng.random() < settings.reads else percept
        yield text.join(text.explain(rng, clip.look, about, settings.sentence_noise)), answer


def captions(clip: ClipSpec, settings: WorldSettings) -> Iterator[tuple[str, str]]:
    """Captions of what is seen and heard, with a random answer, since a base model recognises no emotion yet; and
    explanations that have nothing to do with the clip, each with the answer that it speaks of."""
    rng = generator(settings, "caption", clip.number)
    for _ in range(settings.captions):
        yield text.caption(rng, clip.look, clip.face, clip.voice), text.pick(rng, EMOTIONS)
    for _ in range(settings.unrelated):
        yield any_explanation(rng, clip, settings)


def any_explanation(rng: np.random.Generator, clip: ClipSpec, settings: WorldSettings) -> tuple[str, str]:
    """An explanation of any emotion about a person who looks as in `clip`, and that emotion."""
    emotion = text.pick(rng, EMOTIONS)
    return text.join(text.explain(rng, clip.look, emotion, settings.sentence_noise)), emotion


def erv_pairs(clips: list[ClipSpec], settings: WorldSettings) -> tuple[list[dict], list[dict]]:
    """Training and validation pairs of the verifier (section 3.2): a fifth from human annotators, with few of some
    classes; a complement set for those classes; the rest pseudo-labelled. Train and valid share no clip."""
    cut = max(1, round(len(clips) * settings.erv_train / max(1, settings.erv_train + settings.erv_valid)))
    pairs = []
    for name, pool, size in (("train", clips[:cut], settings.erv_train),
                             ("valid", clips[cut:] or clips[:cut], settings.erv_valid)):
        rng, rows = generator(settings, f"erv/{name}"), []
        for i in range(size):
            clip, share = text.pick(rng, pool), i / size
            source = "human" if share < 0.2 else "complement" if share < 0.3 else "pseudo"
            emotion = {"human": rng.choice(EMOTIONS, p=HUMAN_SHARES).item(),
                       "complement": text.pick(rng, COMPLEMENT), "pseudo": clip.label}[source]
            rows.append(text.erv_row(rng, clip.look, emotion, source, str(clip.number), settings.erv_noise,
                                     settings.sentence_noise))
        pairs.append(rows)
    return tuple(pairs)
