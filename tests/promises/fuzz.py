"""Feeds mutated inputs to everything that reads a file or a model's words: a result or one of our named errors, in time.

    python tests/promises/fuzz.py clips|annotations|checkpoints|predictions|explanations [--count 1000] [--seed 0] [--keep FOLDER]

Input i of a kind is a function of (kind, seed, i). Each has SECONDS and may not let memory grow past MEGABYTES; a crash
of the process or an unnamed error counts as a failure. Inputs that kill it are kept in FOLDER.
Prints a JSON report.
"""

import argparse
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SECONDS, MEGABYTES = 20, 1500
INTS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


class Time(BaseException):
    """An input that takes too long; not an Exception, so that no handler in the code under test swallows it."""


# ---- mutations -------------------------------------------------------------------------------------------------------


def mutate(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """One to four of: cut, flipped bytes, an extreme integer, a piece removed, doubled, or taken from `other`; noise."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data) + 1), rng.randint(1, 64)
        kind = rng.choice(("cut", "flip", "flip", "int", "int", "drop", "double", "splice", "noise", "zero"))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and data:
            for _ in range(size):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == "int":
            data[at : at + 4] = rng.choice(INTS).to_bytes(4, rng.choice(("big", "little")))
        elif kind == "drop":
            del data[at : at + size]
        elif kind == "double":
            data[at:at] = data[at : at + 8 * size]
        elif kind == "splice" and other:
            data[at:] = other[rng.randrange(len(other)) :]
        elif kind == "noise":
            data[at : at + size] = rng.randbytes(size)
        elif kind == "zero":
            data[at : at + size] = bytes(size)
    return bytes(data)


WORDS = ("", " ", "happy", "joy", "../../outside.mp4", "/etc/passwd", "..", "NaN", "null", "-1", "0", "1e999", "9" * 400,
         "a\0b", "\ufeff", "é", "快乐", "\ud800", "\u202e", "'", '"', "<think>", "<script>alert(1)</script>", "{", "}", "|",
         "x" * 5000, "1,2,3", "\r\n", "\t", "%s%n", "${HOME}", "$(touch pwned)", "; rm x", "__import__('os')")


def mutate_text(text: str, rng: random.Random) -> bytes:
    """A text with lines and fields lost, doubled, moved or replaced, in a random encoding; or its mutated bytes."""
    if rng.random() < 0.25:
        return mutate(text.encode(), rng)
    lines = text.split("\n")
    for _ in range(rng.randint(1, 3)):
        i, kind = rng.randrange(len(lines)), rng.choice(("drop", "double", "field", "field", "field", "swap", "long"))
        if kind == "drop":
            lines[i] = ""
        elif kind == "double":
            lines.insert(rng.randrange(len(lines) + 1), lines[i])
        elif kind == "swap":
            lines[i] = lines[i].swapcase()
        elif kind == "long":
            lines[i] = lines[i] * rng.choice((2, 100))
        else:
            separator = rng.choice((",", " ", '"', ":", "|"))
            fields = lines[i].split(separator)
            fields[rng.randrange(len(fields))] = rng.choice(WORDS)
            lines[i] = separator.join(fields)
    encoding = rng.choice(("utf-8",) * 5 + ("utf-16", "utf-8-sig", "gb18030", "latin-1", "utf-32"))
    return "\n".join(lines).encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


def mutate_json(value, rng: random.Random, depth: int = 0):
    """A JSON value with one place replaced, removed, retyped, nested or blown up."""
    odd = (None, True, 0, -1, 1, 2**31, 10**9, 10**30, 1e308, float("nan"), "", "x" * 1000, [], {}, [[]], {"a": 1}, *WORDS)
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1 and depth:
        return rng.choice(odd)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, copy = rng.choice(keys), value.copy()
    kind = rng.choice(("in", "in", "in", "drop", "add"))
    if kind == "in":
        copy[key] = mutate_json(copy[key], rng, depth + 1)
    elif kind == "drop":
        del copy[key]
    elif isinstance(copy, dict):
        copy[rng.choice(WORDS)] = rng.choice(odd)
    else:
        copy.insert(key, rng.choice((copy[key], *odd)))
    return copy


def dump(value, rng: random.Random) -> bytes:
    """JSON of a value, at times mutated as text, or nested beyond any parser."""
    text = json.dumps(value, indent=rng.choice((None, 1)))
    chance = rng.random()
    return b"[" * 200_000 if chance < 0.01 else mutate_text(text, rng) if chance < 0.3 else text.encode()


# ---- kinds: setup(folder) once, then run(rng, folder) for each input -----------------------------------------------


class Clips:
    def __init__(self, folder: Path):
        import numpy as np
        import soundfile
        from erv_min.toy.render import encode
        from test_media import write_clip
        frames = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8)
        tone = np.sin(np.arange(8000) / 10).astype(np.float32)
        self.base = {"toy.mp4": encode(frames, tone), "long.mp4": encode(frames, np.tile(tone, 8))}
        for name, options in {"a.mp4": {}, "silent.mp4": {"sound": None}, "b.avi": {"codec": "mpeg4", "sound": "mp3"},
                              "c.mkv": {}, "d.mov": {"sound": None}}.items():
            try:
                write_clip(folder / name, n=6, size=(64, 48), seconds=0.5, **options)
            except Exception:  # an encoder that this build of FFmpeg lacks
                continue
            self.base[name] = (folder / name).read_bytes()
        for name in ("e.wav", "f.flac"):
            buffer = io.BytesIO()
            soundfile.write(buffer, tone, 16000, format=name[2:].upper())
            self.base[name] = buffer.getvalue()

    def run(self, rng, folder):
        from erv_min.media import load_clip
        name = rng.choice(list(self.base))
        data = bytearray(self.base[name])
        if rng.random() < 0.15:  # huge dimensions where MP4 and AVI declare them
            for mark, skip in ((b"avc1", 28), (b"tkhd", 80), (b"strf", 8), (b"avih", 36)):
                if (at := data.find(mark)) >= 0:
                    data[at + skip : at + skip + 2] = rng.choice((b"\xff\xff", b"\x7f\xff", b"\0\0", b"\x40\0"))
        suffix = Path(rng.choice(list(self.base))).suffix if rng.random() < 0.15 else Path(name).suffix
        path = folder / f"clip{suffix}"
        path.write_bytes(b"" if rng.random() < 0.01 else mutate(data, rng, self.base[rng.choice(list(self.base))]))
        silence = rng.choice(("hear", "error"))
        clip = load_clip(path, rng.choice(("video_audio", "video", "audio")), 4, 32, 8, 50, silence=silence)
        assert clip.video is None or tuple(clip.video.shape) == (4, 3, 32, 32) and bool(clip.video.isfinite().all())
        assert clip.audio is None or tuple(clip.audio.shape) == (8, 50) and bool(clip.audio.isfinite().all())
        assert not clip.silent or silence == "hear" and clip.audio.eq(-1.5).all()


class Annotations:
    def __init__(self, folder: Path):
        turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "<think>She smiles.</think><answer>happy</answer>"}]
        lines = [f"{i:05d}.mp4" for i in range(1, 6)]
        self.files = {
            "dfew": ("single_trainset_5.csv", "order,label\n" + "\n".join(f"{i},{i}" for i in range(1, 6))),
            "mafw": ("set_5/train.txt", "\n".join(f"{n} {w}" for n, w in zip(lines, ("happiness", "2", "3", "anger", "11")))),
            "emer": ("EMER.csv", "names,emotions,subtitles,reasons\n" + "\n".join(
                f'sample_{i},{w},"Hello, you","He smiles, then ""laughs""."' for i, w in enumerate(("happy", "angry", "sad")))),
            "merr": ("MERR_fine_grained.json", {f"sample_{i}": {"pseu_emotion": w, "smp_reason_caption": "x", "text": "y"}
                                                for i, w in enumerate(("happy", "sad"))}),
            "json": ("train.json", [{"video": f"clip/{i}.mp4", "conversations": turns} for i in range(3)]),
            "erv": ("rows.jsonl", "\n".join(json.dumps({"text": "She smiles.", "labels": ["joy"], "source": "emer",
                                                        "clip": str(i)}) for i in range(3)))}

    def run(self, rng, folder):
        from erv_min.data.examples import check_clips, load_examples, summary
        from erv_min.data.pairs import counts_table, read_rows
        name = rng.choice(list(self.files))
        file, content = self.files[name]
        if name == "mafw" and rng.random() < 0.5:
            file = f"Train & Test Set/single/no_caption/{file}"
        root = folder / "root"
        shutil.rmtree(root, ignore_errors=True)
        for path in (Path(file).parent, "clip", "clips"):
            (root / path).mkdir(parents=True, exist_ok=True)
        for i in range(6):
            for path in (f"clip/{i}.mp4", f"clips/{i:05d}.mp4", f"clip/sample_{i}.avi"):
                (root / path).touch()
        if isinstance(content, str):
            (root / file).write_bytes(mutate_text(content, rng))
        else:
            (root / file).write_bytes(dump(mutate_json(content, rng), rng))
        if name == "erv":
            return counts_table(read_rows([root / file]))
        whole = name != "json" and rng.random() < 0.7  # the data root: a folder, or the file itself
        spec = f"{name}:{root if whole else root / file}"
        examples = load_examples(spec, "sft" if name == "json" else "train")
        for example in examples:
            assert Path(os.path.abspath(example.path)).is_relative_to(root), f"{example.path} leaves {root}"
        summary(examples)
        check_clips(examples, 1.0, folder / "missing.txt")


class Checkpoints:
    def __init__(self, folder: Path):
        import torch
        from dataclasses import replace
        from erv_min.checkpoint import save_erv, save_humanomni
        from erv_min.config import humanomni, roberta
        from erv_min.emotions import ERV_LABELS
        from erv_min.model.bert import RobertaClassifier
        from erv_min.model.parameters import random_humanomni
        from erv_min.train.state import save_state
        from erv_min.train.optimizer import make_optimizer
        from erv_min.train.sharding import Replicated
        config = replace(roberta("toy", len(ERV_LABELS)), vocab_size=50)
        torch.manual_seed(0)
        self.model = RobertaClassifier(config)
        save_erv(self.model, folder / "erv", ERV_LABELS)
        save_humanomni(random_humanomni(humanomni("toy"), 0), folder / "policy")
        self.linear = torch.nn.Linear(3, 2)
        self.held = Replicated(self.linear, compute=torch.float32)
        optimizer = make_optimizer(self.linear.parameters())
        self.linear(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        save_state(folder / "run", 1, self.held, optimizer)
        self.places = {"erv": folder / "erv", "policy": folder / "policy", "run": folder / "run/state-000001"}

    def run(self, rng, folder):
        import torch
        from safetensors.torch import load_file, save_file
        from erv_min.checkpoint import load_erv, load_humanomni
        from erv_min.train.state import load_state
        from erv_min.train.optimizer import make_optimizer
        kind = rng.choice(("erv",) * 8 + ("policy",) * 5 + ("run",) * 2)
        place = folder / "x" / self.places[kind].name
        shutil.rmtree(folder / "x", ignore_errors=True)
        shutil.copytree(self.places[kind], place)
        weights = next(place.glob("*.safetensors"))
        target = rng.choice(("header", "bytes", "tensors", "json", "json", "name"))
        if target == "name":
            weights.rename(place / rng.choice(("model-1-of-1.safetensors", "model-1-of-2.safetensors",
                                               "model-a-of-b.safetensors", "pytorch_model.bin")))
        elif target == "tensors":
            tensors = load_file(weights)
            name = rng.choice(list(tensors))
            change = rng.choice(("dtype", "shape", "drop", "add", "flat", "empty"))
            if change == "drop":
                del tensors[name]
            elif change == "add":
                tensors[rng.choice(WORDS).replace("\ud800", "").replace("\0", "") or "y"] = torch.zeros(1)
            else:
                x = tensors[name]
                tensors[name] = {"dtype": x.to(rng.choice((torch.int8, torch.bool, torch.float64))), "empty": x.flatten()[:0],
                                 "shape": x[None].contiguous(), "flat": x.flatten()}[change].contiguous()
            save_file(tensors, weights)
        elif target == "json":
            path = rng.choice(list(place.glob("*.json")))
            path.write_bytes(dump(mutate_json(json.loads(path.read_text()), rng), rng))
        else:
            data = weights.read_bytes()
            size = 8 + int.from_bytes(data[:8], "little") if target == "header" else len(data)
            weights.write_bytes(mutate(data[:size], rng) + data[size:])
        if kind == "run":
            load_state(place.parent, self.held, make_optimizer(self.linear.parameters()))
        else:
            load_erv(place) if kind == "erv" else load_humanomni(place, device=rng.choice(("cpu", "meta")))


class Predictions:
    def __init__(self, folder: Path):
        from erv_min.inputs import Example
        self.examples = [Example(str(i), Path(f"{dataset}/{i}.mp4"), label, dataset, split="test")
                         for dataset, label in (("dfew", "happy"), ("mafw", "happiness")) for i in range(5)]
        self.rows = [{"video_id": x.video_id, "output": "<think>She smiles.</think><answer>happy</answer>",
                      "ground_truth": x.label, "dataset": x.dataset} for x in self.examples]
        self.judged = [{f"{i}.mp4": {"reason": "She smiles.", "gpt_response": "Happy"}} for i in range(5)]
        self.text = "\n".join(f"{i}.mp4|<think>She\nsmiles.</think>\n<answer>happy</answer>" for i in range(5))

    def run(self, rng, folder):
        from erv_min.emotions import labels
        from erv_min.base.files import append_jsonl, write_json
        import erv_min.toy.judges  # noqa: F401
        from erv_min.judge import judge_rows, make_judge, read_answer
        from erv_min.metrics import score
        from erv_min.base.chat import ChatClient
        from erv_min.data.results import read_predictions
        for _ in range(3):
            said = mutate_text(rng.choice(("happy", "Answer: Happy.", "The emotion is sad", "neutral\n")), rng)
            judgement = read_answer(said.decode("utf-8", rng.choice(("replace", "ignore", "surrogateescape"))), labels("dfew"))
            assert judgement.status in ("ok", "outside") and (judgement.emotion in labels("dfew")) == (judgement.status == "ok")
        kind, path = rng.choice(("rows", "judged", "text", "cache")), folder / "predictions"
        if kind == "text":
            path.write_bytes(mutate_text(self.text, rng))
        elif kind == "judged":
            path.write_bytes(dump(mutate_json(self.judged, rng), rng))
        elif kind == "rows":
            rows = [mutate_json(row, rng) if rng.random() < 0.1 else row for row in self.rows]
            text = "\n".join(json.dumps(row) for row in rows)
            path.write_bytes(mutate_text(text, rng) if rng.random() < 0.3 else text.encode())
        else:
            rows = [mutate_json({"key": "k", "model": "m", "raw": "happy"}, rng) for _ in range(3)]
            path.write_bytes(b"\n".join(dump(row, rng) for row in rows))
            os.environ["OPENAI_API_KEY"] = "sk-planted"
            assert all(answer.strip() for answer in ChatClient("openai:gpt-4.1-mini", path).answers.values())
            return
        examples = self.examples if kind == "rows" else self.examples[:5]  # the other forms name no data set
        rows, _ = read_predictions(str(path), examples if kind != "rows" or rng.random() < 0.5 else [])
        assert len({(row["dataset"].lower(), row["video_id"]) for row in rows}) == len(rows)
        judge_rows([row for row in rows], make_judge("lexicon"))
        for dataset in {row["dataset"] for row in rows}:
            write_json(folder / "scores.json", score([row for row in rows if row["dataset"] == dataset], dataset))
        for row in rows:
            append_jsonl(folder / "log.jsonl", row)


class Explanations:
    def __init__(self, folder: Path):
        from erv_min.tokenizer import EncoderTokenizer
        from erv_min.toy.world import WorldSettings, build_world
        build_world(folder / "world", WorldSettings(train=1, test=1, pretrain=1, sft_clips=1, resamples=1, captions=1,
                                                    erv_train=20, erv_valid=5), workers=1)
        self.tokenizer = EncoderTokenizer(folder / "world/tokenizers/erv", max_length=64)
        self.whole = '<think>She smiles. "Stop!" he says... Mr. X looks sad?</think>\n<answer>happy</answer>'

    def run(self, rng, folder):
        import torch
        from erv_min.emotions import ERV_LABELS
        from erv_min.train.log import explanation_statistics
        from erv_min.base.files import append_jsonl
        from erv_min.rewards import RewardSettings, extract_answer, score_completions
        tags = ("<think>", "</think>", "<answer>", "</answer>", '"', ". ", "!? ", "\n", "\0", "\x1b[31m", "\u202e", "happy", "。")
        kind = rng.random()
        if kind < 0.5:
            text = mutate_text(self.whole, rng).decode("utf-8", "replace")
        elif kind < 0.9:
            text = "".join(rng.choice((*tags, *string.printable)) for _ in range(rng.randint(0, 400)))
        elif kind < 0.97:
            text = "<think>" + rng.choice(tags) * rng.randint(1, 20_000) + rng.choice(tags)
        else:
            text = "<think>" + (rng.choice(tags) + rng.choice(("", " ", "a", "a "))) * 250_000
            text = text[: 2**20]

        def verifier(sentences):
            ids, _ = self.tokenizer.encode_batch(sentences[:50])
            assert ids.shape[1] <= 64
            return torch.full((len(sentences), len(ERV_LABELS)), 0.3)

        settings = RewardSettings(sentence_rule=rng.choice(("released", "extended")),
                                  answer_rule=rng.choice(("paper", "released")))
        rewards = score_completions([text], ["happy"], "dfew", verifier, ERV_LABELS, settings)
        extract_answer(text, "released")
        statistics = explanation_statistics(rewards)
        assert 0 <= rewards[0].total <= 3
        append_jsonl(folder / "log.jsonl", {"completion": text[:1000], **statistics})


KINDS = {"clips": Clips, "annotations": Annotations, "checkpoints": Checkpoints, "predictions": Predictions,
         "explanations": Explanations}

# ---- one process that may die, and one that watches it ---------------------------------------------------------------


def worker(kind: str, count: int, seed: int, first: int, folder: Path) -> None:
    """Inputs first..count; a line of JSON each on stdout."""
    import torch
    from erv_min.base.errors import ErvMinError
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    target = KINDS[kind](folder / "setup")
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(Time()))
    for i in range(first, count):
        place = folder / "input"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        print(json.dumps({"i": i}), flush=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.alarm(SECONDS)
        try:
            target.run(random.Random(f"{kind} {seed} {i}"), place)
            outcome = "result"
        except ErvMinError as error:
            outcome = type(error).__name__
            if not str(error):
                outcome = "failure: an error without a message"
        except (Exception, Time) as error:
            outcome = f"failure: {type(error).__name__}: {error} " + " < ".join(
                f"{Path(f.filename).name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__)[-6:]))
        signal.alarm(0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if grown > MEGABYTES:
            outcome = f"failure: {grown:.0f} MB"
        print(json.dumps({"i": i, "outcome": outcome[:600]}), flush=True)


def fuzz(kind: str, count: int, seed: int, keep: Path | None = None) -> dict:
    """Runs `count` inputs; a process that dies is started again behind the input that killed it."""
    outcomes, failures, first = Counter(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "setup").mkdir()
        while first < count:
            shutil.rmtree(Path(folder) / "setup")
            (Path(folder) / "setup").mkdir()
            command = [sys.executable, __file__, kind, "--count", str(count), "--seed", str(seed), "--worker", str(first), folder]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                       env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "AV_LOG_LEVEL": "0"})
            out, err = process.communicate()
            lines = [json.loads(line) for line in out.splitlines() if line.startswith('{"i"')]
            if not lines:
                raise SystemExit(f"{kind}: no input was run: {err[-2000:]}")
            done = [line for line in lines if "outcome" in line]
            if len(done) * 2 < len(lines) or process.returncode:
                done.append({"i": lines[-1]["i"], "outcome": f"failure: the process died ({process.returncode}) {err[-300:]}"})
                if keep:
                    shutil.copytree(Path(folder) / "input", keep / f"{kind}-{seed}-{lines[-1]['i']}", dirs_exist_ok=True)
            for line in done:
                outcomes[line["outcome"].split(":")[0]] += 1
                if line["outcome"].startswith("failure"):
                    failures.append(line)
            first = done[-1]["i"] + 1
    return {"kind": kind, "seed": seed, "count": sum(outcomes.values()), "outcomes": dict(outcomes), "failures": failures}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.kind, args.count, args.seed, int(args.worker[0]), Path(args.worker[1]))
    else:
        print(json.dumps(fuzz(args.kind, args.count, args.seed, args.keep), indent=1))
