"""A tiny world for runs of whole scripts, and what such a run shows from outside.

The world has clips, a policy of width 16 that has learnt to write in the format, and a verifier of width 16. A script
is called as a user calls it, `main([...])`, and told by its files. Two names of the package are replaced, so that a
test knows what was sampled and how it was judged: `generate.rollout`, wherever it was imported, by one that also keeps
what it was given and what it returned, and `Verifier.probabilities` by a table.
"""

import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import erv_min.generate
from erv_min.checkpoint import save_erv, save_humanomni
from erv_min.config import BertConfig, HumanOmniConfig, Qwen2Config, SiglipConfig, WhisperConfig
from erv_min.emotions import GOEMOTIONS
from erv_min.erv import Verifier
from erv_min.media import load_frames, load_waveform, log_mel, pixel_values
from erv_min.model.bert import RobertaClassifier
from erv_min.model.humanomni import HumanOmni
from erv_min.model.parameters import init_weights
from erv_min.prompts import QUESTION, REASONING_SUFFIX, render
from erv_min.tokenizer import EncoderTokenizer, Tokenizer
from erv_min.toy.world import WorldSettings, build_world

ROOT = Path(__file__).parent.parent
EMOTIONS = ("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise", "contempt", "anxiety",
            "helplessness", "disappointment")
SAYS = ("He smiles.", "She wears a red shirt.", "Mr. Lee looks down.", "The voice is low!", "She is angry.")
ANSWERS = ("happy", "sad", "neutral", "angry", "a bit of happiness", "a bit of happiness")


# ---- the world -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What a run left behind."""

    out: Path
    rows: list[dict]  # of metrics.jsonl
    weights: dict[str, torch.Tensor]
    calls: list[dict]  # of `rollout`, see `record`


@dataclass
class Tiny:
    """A folder with "world", "policy" and "verifier", "towers" of another policy, "merr" (clips that are wider than
    high, with subtitles), and the runs in it: equal ones are done once."""

    folder: Path
    runs: dict = field(default_factory=dict)

    def run(self, name: str, options: dict, judged_by_table: bool = True) -> Run:
        """scripts/NAME.py with these options, in this process."""
        key = name, *command(options)
        if key not in self.runs:
            out, main = self.folder / f"run-{len(self.runs)}", script(name).main
            with pytest.MonkeyPatch.context() as patch:
                calls = record(patch, judged_by_table)
                main(command(options | {"out": out, "device": "cpu"}))
            self.runs[key] = finished(out, calls)
        return self.runs[key]


    def run_on_two(self, wanted: list[tuple[str, dict]]) -> list[Run]:
        """Each (script, options) on two processes, one after the other under one torchrun. A Run's `calls` are those of
        both: of each two that belong together the rows in the order of the prompts, every second from each process."""
        outs = [self.folder / f"two-{len(self.runs)}-{i}" for i in range(len(wanted))]
        listed = [[name, command(options | {"out": out, "device": "cpu"}), str(out)]
                  for (name, options), out in zip(wanted, outs)]
        (self.folder / "runs.json").write_text(json.dumps(listed))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run([*launch, str(ROOT / "tests/two_processes.py"), str(self.folder / "runs.json")],
                              capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found = []
        for (_, options), out in zip(wanted, outs):
            calls = [json.loads((out / f"calls-{rank}.json").read_text()) for rank in (0, 1)]
            found.append(finished(out, [interleaved(*two, options["group_size"]) for two in zip(*calls)]))
        return found


def interleaved(first: dict, second: dict, group_size: int) -> dict:
    """Two processes' calls of `rollout` as one: a group of the first, one of the second, and so on."""
    joined = {}
    for name in first:
        joined[name] = []
        for at in range(0, len(first[name]), group_size):
            joined[name] += first[name][at : at + group_size] + second[name][at : at + group_size]
    return joined


def finished(out: Path, calls: list[dict]) -> Run:
    return Run(out, read_rows(out / "metrics.jsonl"), load_file(out / "model.safetensors"), calls)


def make(folder: Path) -> Tiny:
    """Renders, trains and saves all of it in `folder`, a few seconds' work."""
    world = folder / "world"
    sizes = dict(train=18, test=4, pretrain=2, sft_clips=7, resamples=3, erv_train=70, erv_valid=24)
    build_world(world, WorldSettings(**sizes), workers=1)
    labels = world / "single_trainset_5.csv"  # happy, sad, neutral in turn: three labels are met more often than seven
    names = [line.partition(",")[0] for line in labels.read_text().splitlines()[1:]]
    labels.write_text("".join(["video_name,label\n", *(f"{name},{i % 3 + 1}\n" for i, name in enumerate(names))]))
    save_verifier(world, folder / "verifier", EMOTIONS)
    save_verifier(world, folder / "verifier-28", GOEMOTIONS)
    save_policy(world, folder / "policy")
    save_towers(folder / "policy", folder / "towers")
    save_merr(folder / "merr")
    return Tiny(folder)


def save_verifier(world: Path, folder: Path, labels: tuple[str, ...]) -> None:
    """A RoBERTa of width 16 with random weights."""
    tokenizer = EncoderTokenizer(world / "tokenizers/erv")
    torch.manual_seed(0)
    network = RobertaClassifier(BertConfig(tokenizer.vocab_size, 16, 1, 2, 32, 130, type_vocab_size=1,
                                           num_labels=len(labels), roberta=True, pad_token_id=1))
    for p in network.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    save_erv(network, folder, labels)
    (folder / "tokenizer.json").write_bytes((world / "tokenizers/erv/tokenizer.json").read_bytes())


def save_policy(world: Path, folder: Path) -> None:
    config = HumanOmniConfig(
        Qwen2Config(800, 16, 32, 1, 2, 1, max_position_embeddings=1024),
        SiglipConfig(8, 16, 2, 2, image_size=24, patch_size=6),
        WhisperConfig(8, 1, 2, 16, num_mel_bins=8, max_source_positions=12, classifier_proj_size=4),
        BertConfig(256, 8, 1, 2, 16, max_position_embeddings=160), num_frames=2, gate_hidden_size=8)
    model = HumanOmni(config)
    init_weights(model, 0)
    model.source_folder, model.gate_folder = world / "tokenizers/lm", world / "tokenizers/text_gate"
    teach_the_format(model, Tokenizer(world / "tokenizers/lm"), EncoderTokenizer(world / "tokenizers/text_gate"))
    save_humanomni(model, folder)


def teach_the_format(model: HumanOmni, tokenizer: Tokenizer, gate_tokenizer: EncoderTokenizer,
                     steps: int = 200) -> None:
    """Makes the policy write <think>...</think> and an answer, of a few sentences, most of the time. The first one
    mostly depends on how bright the clip is, so that the policy looks at it."""
    generator = torch.Generator().manual_seed(0)
    prompt = tokenizer.encode(render())
    gate_ids, gate_mask = gate_tokenizer.encode_batch([f"{QUESTION} {REASONING_SUFFIX}"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    image, mels = model.config.vision.image_size, model.config.audio.num_mel_bins
    for step in range(steps):
        rows, shown = [], torch.randint(2, (8,), generator=generator).tolist()
        for bright in shown:
            first, second = torch.randint(len(SAYS), (2,), generator=generator).tolist()
            answer = ANSWERS[int(torch.randint(len(ANSWERS), (1,), generator=generator))]
            first = (0, 3)[bright] if second else first
            text = f"<think>{SAYS[first]} {SAYS[second]}</think>\n<answer>{answer}</answer><|im_end|>"
            rows.append(tokenizer.encode(text))
        width = max(map(len, rows))
        ids = torch.tensor([prompt + row + [tokenizer.pad_id] * (width - len(row)) for row in rows])
        labels = torch.tensor([[-100] * len(prompt) + row + [-100] * (width - len(row)) for row in rows])
        video = (2.0 * torch.tensor(shown) - 1)[:, None, None, None, None].expand(8, 2, 3, image, image)
        audio = torch.randn(8, mels, 24, generator=generator)
        loss = model(ids, video=video, audio=audio, gate_ids=gate_ids, gate_mask=gate_mask, labels=labels).loss
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()


def save_towers(policy: Path, folder: Path) -> None:
    """Each tower of a policy in a folder of its own, under its repository's names, with other weights."""
    weights, sizes = load_file(policy / "model.safetensors"), json.loads((policy / "towers.json").read_text())
    for part, prefix, theirs in (("vision", "model.vision_tower.vision_tower.", ""),
                                 ("audio", "model.audio_tower.audio_tower.", "model."),
                                 ("text", "model.bert_model.", "bert.")):
        own = {name.replace(prefix, theirs): weight * 1.5 for name, weight in weights.items()
               if name.startswith(prefix)}
        (folder / part).mkdir(parents=True)
        save_file(own, folder / part / "model.safetensors")
        (folder / part / "config.json").write_text(json.dumps(sizes[part]))
    (folder / "text/tokenizer.json").write_bytes((policy / "text_gate/tokenizer.json").read_bytes())


def save_merr(folder: Path) -> None:
    """Four clips of MERR-fine, 64 x 40, with what is said in three of them."""
    folder.mkdir()
    rng, entries = np.random.default_rng(0), {}
    for i, label in enumerate(("happy", "sad", "angry", "neutral")):
        with av.open(str(folder / f"m{i}.mp4"), "w") as out:
            video, audio = out.add_stream("libx264", rate=8), out.add_stream("aac", rate=16000, layout="mono")
            video.width, video.height, video.pix_fmt = 64, 40, "yuv420p"
            for _ in range(6):
                image = rng.integers(0, 255, (1, 2, 3), np.uint8).repeat(40, 0).repeat(32, 1)
                out.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(video.encode(None))
            tone = (np.sin(np.arange(12000) * (i + 1) / 20) / 2).astype(np.float32)[None]
            frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 0
            out.mux([*audio.encode(frame), *audio.encode(None)])
        said = ("No!", "", "Well.", "He?")[i]
        entries[f"m{i}"] = {"pseu_emotion": label, "smp_reason_caption": SAYS[i], "text": said}
    (folder / "MERR_fine_grained.json").write_text(json.dumps(entries))


# ---- a run from outside ----------------------------------------------------------------------------------------------


@functools.cache
def script(name: str):
    """The module of scripts/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def command(options: dict) -> list[str]:
    """{"micro_batch": 2, "recompute": True} -> ["--micro-batch=2", "--recompute"]; paths and numbers as they print."""
    words = []
    for name, value in options.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words.append(f"--{name}={value}")
    return words


def table(sentence: str) -> list[float]:
    """A verifier without a network: 11 probabilities that are a function of the sentence. Every third sentence is
    neutral alone; in the others anger,
    happiness, neutral and sadness come forward, any number of them over 0.5."""
    digest = hashlib.sha256(sentence.encode()).digest()
    u = [byte / 1024 for byte in digest[:11]]  # under 0.25
    if digest[11] % 3 == 0:
        u[4] = 0.9
        return u
    for emotion, byte in zip((0, 3, 4, 5), digest[12:16]):
        u[emotion] = 0.4 + 0.55 * byte / 256 + emotion / 10_000  # no two are equal
    return u


def replace_everywhere(patch, old, new) -> None:
    """Each attribute of each loaded module that is `old` becomes `new`."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()) if hasattr(module, "__dict__") else ():
            if value is old:
                patch.setattr(module, name, new)


def record(patch, judged_by_table: bool) -> list[dict]:
    """Returns a list that each call of `rollout` adds to: its arguments by name, and what it returned, row by row,
    under "sampled" (ids up to and with EOS) and "logps". Puts `table` in the verifier's place, if asked to."""
    original, calls = erv_min.generate.rollout, []

    def rollout(*args, **kwargs):
        found = original(*args, **kwargs)
        given = inspect.signature(original).bind(*args, **kwargs)
        given.apply_defaults()
        calls.append(given.arguments | {
            name: [row[mask].tolist() for row, mask in zip(values, found.mask)]
            for name, values in (("sampled", found.ids), ("logps", found.logps))})
        return found

    def probabilities(self, sentences):
        return torch.tensor([table(sentence) for sentence in sentences])

    replace_everywhere(patch, original, rollout)
    if judged_by_table:
        patch.setattr(Verifier, "probabilities", probabilities)
    return calls


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- what the plain step is given, and how its end is compared -------------------------------------------------------


def input_of(example, model: HumanOmni, folder: Path, o: SimpleNamespace) -> tuple[list[int], dict]:
    """(prompt ids, the clip's and the gate's tensors) of an example, as HumanOmni.forward takes them. `o` has
    num_frames, modality, prompt_stage, geometry and subtitles."""
    question, clip = f"{QUESTION} {REASONING_SUFFIX}", {}
    if o.subtitles and example.subtitle:
        question += f' The subtitle of the video is: "{example.subtitle}"'
    prompt = render(question, o.modality, o.prompt_stage)
    turn = prompt.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
    gate = turn.replace("<video>", "").replace("\n", "") if o.prompt_stage == "sft" else question
    clip["gate_ids"], clip["gate_mask"] = EncoderTokenizer(folder / "text_gate").encode_batch([gate])
    if "video" in o.modality:
        size = model.config.vision.image_size
        clip["video"] = pixel_values(load_frames(example.path, o.num_frames), size, o.geometry)[None]
    if "audio" in o.modality:
        audio = model.config.audio
        mel = log_mel(load_waveform(example.path), audio.num_mel_bins, 2 * audio.max_source_positions)
        clip["audio"] = mel[None]
    return Tokenizer(folder).encode(prompt), clip


def assert_same_rows(rows: list[dict], expected: list[dict]) -> None:
    """Each number of `expected` stands in `rows`."""
    assert len(rows) == len(expected)
    for row, values in zip(rows, expected):
        for name, value in values.items():
            said = f"step {row['step']}: {name} is {row[name]}, {value} was expected"
            assert row[name] == pytest.approx(value, rel=1e-5, abs=3e-7), said


def without_clocks(row: dict) -> dict:
    """A row of metrics.jsonl without what the machine's speed says, and without what is rounding alone."""
    return {name: value for name, value in row.items() if not re.search("second|per_s|sampler_gap|skipped", name)}


def largest_move(weights: dict, start: dict) -> float:
    return max(float((weights[name] - start[name]).abs().max()) for name in start)


def assert_same_weights(weights: dict, expected: dict, start: dict, steps: int) -> None:
    """Equal to 2e-6 of the largest weight's move, and the rounding of the weights themselves at each step."""
    move = largest_move(weights, start)
    assert move > 1e-3
    for name, before in start.items():
        rounding = steps * torch.finfo(torch.float32).eps * float(before.abs().max())
        apart = float((weights[name] - expected[name]).abs().max())
        assert apart <= 2e-6 * move + rounding, f"{name}: {apart:.2e} apart, the largest move is {move:.2e}"


def assert_same_run(run: Run, other: Run, start: dict) -> None:
    """What was sampled, each number of metrics.jsonl, the weights."""
    said = [[ids for call in x.calls for ids in call["sampled"]] for x in (run, other)]
    assert said[0] == said[1]
    assert_same_rows(run.rows, [without_clocks(row) for row in other.rows])
    assert_same_weights(run.weights, other.weights, start, len(other.rows))


def assert_other_weights(weights: dict, others: dict, start: dict) -> None:
    """More than 1e-3 of the largest weight's move apart."""
    apart, move = largest_move(weights, others), largest_move(others, start)
    assert apart > 1e-3 * move, f"{apart / move:.1e} of the largest move apart"
