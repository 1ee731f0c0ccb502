"""The toy's stages before GRPO and its table after it: the whole method from nothing, by commands that a user could type.

    world, rendered  ->  base model, SFT  (one process)   ->  [GRPO without R_E]  ->  GRPO  ->  table 1 on held-out clips
                     ->  verifier         (beside it)

Each process of the toy computes on one thread: sums then run in one order, and a seed gives the same table to the last
digit whatever else the machine does. Stages that do not need each other run side by side instead.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from erv_min.checkpoint import load_humanomni
from erv_min.data.examples import load_examples
from erv_min.data.predictions import predict
from erv_min.inputs import Collator
from erv_min.judge import judge_rows, make_judge
from erv_min.metrics import COLUMNS, score, table
from erv_min.rewards import format_reward
from erv_min.run.files import atomic_write, write_json
from erv_min.run.folder import STOPPED
from erv_min.run.options import build, option_name
from erv_min.run.processes import Processes, barrier
from erv_min.run.settings import PRESETS, Answers, GRPOSettings
from erv_min.run.start import decoding

WEIGHTS = "model.safetensors"  # written last: a folder that holds it is done
GROUP = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}  # torchrun's


def run(*commands: list[str]) -> None:
    """Runs `python COMMAND` for each, side by side with one thread each, apart from this process's group; waits for all.

    SIGTERM is handed on (Ctrl-C reaches them by itself), and one that fails ends the others. Raises SystemExit: STOPPED
    where they stopped in order, else naming the command that failed.
    """
    environment = {k: v for k, v in os.environ.items() if k not in GROUP and not k.startswith("TORCHELASTIC")}
    stages: list[subprocess.Popen] = []

    def stop(*_) -> None:
        for stage in stages:
            stage.terminate()

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop), signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}
    for command in commands:
        print("$ python", *command, flush=True)
        stages.append(subprocess.Popen([sys.executable, *command], env=environment | {"OMP_NUM_THREADS": "1"}))
    while not any(status := [stage.poll() for stage in stages]) and None in status:
        time.sleep(0.1)
    if None in status:
        stop()
    ended = [stage.wait() for stage in stages]
    for number, handler in before.items():
        signal.signal(number, handler)
    for code, command in zip(status, commands):
        if code and code not in (STOPPED, -signal.SIGTERM, -signal.SIGINT):
            raise SystemExit(f"'python {' '.join(command)}' ended with status {code}: its message stands above")
    if any(ended):
        raise SystemExit(STOPPED)


def world_folder(settings) -> Path:
    """Where the embedded world lies: --world, else in OUT or beside it, else (to be made) in OUT for GRPO, beside others."""
    if settings.world:
        return Path(settings.world)
    inside, beside = Path(settings.out) / "world", Path(settings.out).parent / "world"
    found = next((path for path in (inside, beside) if (path / "world.json").exists()), None)
    return found or (inside if isinstance(settings, GRPOSettings) else beside)


def prepare_world(settings, processes: Processes, base: bool) -> Path:
    """Renders the embedded world, and trains its base model if `base`, where they are not there yet; names its folder in
    `settings`. The main process makes it, the others wait."""
    world = world_folder(settings)
    settings.world = str(world)
    if processes.main and not (world / (f"base/{WEIGHTS}" if base else "world.json")).exists():
        run(["-m", "erv_min.toy", str(world), "--seed", str(settings.seed), *([] if base else ["--clips-only"])])
    barrier()
    return world


def options(settings, usual, without: tuple[str, ...] = ()) -> list[str]:
    """What a user would type to get `settings`: an option for each field whose value is not that of `usual`."""
    words = []
    for field in dataclasses.fields(settings):
        value, option = getattr(settings, field.name), option_name(field.name)
        if dataclasses.is_dataclass(value):
            words += options(value, getattr(usual, field.name), without)
        elif field.name not in without and value != getattr(usual, field.name):
            words += [option if value else f"--no{option[1:]}"] if isinstance(value, bool) else [option, str(value)]
    return words


def prepare(settings: GRPOSettings, scripts: Path, processes: Processes) -> None:
    """Makes world, SFT, verifier and, where asked, the Baseline, each where it is not there yet; names them in `settings`.

    `scripts` is the folder of the stages' scripts. The main process makes them, the others wait. With --random-weights
    the world's text is all that is needed.
    """
    out, same = Path(settings.out), ["--seed", str(settings.seed)]
    world = prepare_world(settings, processes, base=False)
    if settings.random_weights:
        return
    same += ["--preset", "toy", "--world", str(world), "--device", settings.device or "cpu", "--resume"]
    human = ["--sources", "human"] if settings.ablate == "augmentation" else []  # table 2: a verifier of its own
    verifier, sft, baseline, todo = out / ("erv-unaugmented" if human else "erv"), out / "sft", out / "baseline", []
    if not settings.model and not (sft / WEIGHTS).exists():
        todo.append([str(scripts / "sft.py"), *same, "--out", str(sft)])
    if settings.rewards.w_explanation and not settings.erv and not (verifier / WEIGHTS).exists():
        todo.append([str(scripts / "erv.py"), *same, "--out", str(verifier), *human])
    settings.model, settings.erv = settings.model or str(sft), settings.erv or str(verifier)
    if processes.main and todo:
        run(*todo)
    if processes.main and settings.baseline and not (baseline / WEIGHTS).exists():
        own = ("out", "erv", "ablate", "w_explanation", "baseline", "eval_clips", "resume")
        run([str(scripts / "grpo.py"), *options(settings, build(GRPOSettings, PRESETS["grpo"]["toy"]), own), "--out", str(baseline),
             "--w-explanation", "0", "--eval-clips", "-1", "--resume"])
    barrier()


def compare(settings: GRPOSettings, collate: Collator, processes: Processes) -> None:
    """Held-out clips through SFT, the baseline where asked, and this run: a table like table 1, and evaluation.json."""
    examples = load_examples(f"toy:{settings.world}", "test")[: settings.eval_clips or None]
    name = "GRPO with R_E" if settings.rewards.w_explanation else "GRPO without R_E"
    systems = {"SFT": settings.model}
    if settings.baseline:
        systems["GRPO without R_E"] = f"{settings.out}/baseline"
    systems[name] = settings.out
    judge, scores, kept = make_judge("lexicon"), {}, {}
    for system, folder in systems.items():
        own = Collator(load_humanomni(folder, torch.float32, processes.device), collate.tokenizer,
                       collate.gate_tokenizer, collate.cache, settings.modality, settings.prompt_stage)
        rows, _ = predict(own, examples, processes, Answers(
            temperature=settings.eval_temperature, max_new_tokens=settings.max_new_tokens, seed=settings.seed,
            **decoding(settings)), batch_size=64)
        if processes.main:
            judge_rows(rows, judge)
            scores[system] = score(rows, rows[0]["dataset"])
            kept[system] = 100 * sum(format_reward(row["output"]) for row in rows) / len(rows)
            atomic_write(Path(settings.out, f"predictions-{system.replace(' ', '-')}.jsonl"),
                         "".join(json.dumps(row) + "\n" for row in rows))
    if not processes.main:
        return
    write_json(Path(settings.out, "evaluation.json"), scores)
    print(f"\n{len(examples)} held-out clips, explanations judged by the lexicon, percent:\n{table(scores)}\n\nfiles: "
          + ", ".join(f"{k} {v}" for k, v in systems.items()) + f", evaluation {settings.out}/evaluation.json")
    print(f"{name} over SFT on {len(examples)} held-out clips: "
          + ", ".join(f"{m} {scores[name][m] - scores['SFT'][m]:+.1f}" for m in COLUMNS)
          + f"; {kept[name]:.1f}% of its outputs keep the format (SFT: {kept['SFT']:.1f}%)", flush=True)
