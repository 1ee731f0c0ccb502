"""The toy's stages before GRPO and its table after it: the whole method from nothing, by commands a user could type.

    world, rendered -> base model, SFT | verifier -> [GRPO without R_E] -> GRPO -> table 1 on held-out clips

Each process of the toy computes on one thread: sums then run in one order, and a seed gives the same table to the last
digit whatever else the machine does. What does not need each other runs side by side, and GRPO takes two processes.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch

from erv_min.checkpoint import load_humanomni
from erv_min.data.examples import load_examples
from erv_min.data.predictions import predict
from erv_min.inputs import Collator
from erv_min.judge import judge_rows, make_judge
from erv_min.metrics import COLUMNS, score, table
from erv_min.rewards import extract_explanation, format_reward, split_sentences
from erv_min.run.files import read_jsonl, write_json, write_jsonl
from erv_min.run.folder import STOPPED, open_folder
from erv_min.run.options import build, option_name
from erv_min.run.processes import Processes, barrier, join_processes
from erv_min.run.settings import PRESETS, Answers, GRPOSettings
from erv_min.run.start import decoding
from erv_min.toy.text import check_sentences

TOY = build(GRPOSettings, PRESETS["grpo"]["toy"])
WEIGHTS = "model.safetensors"  # written last: a folder that holds it is done
# What torchrun tells a process of its group.
GROUP = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}


laps = [("", time.time())]  # (what was done, when it was)


def lap(name: str) -> None:
    laps.append((name, time.time()))


def one_thread(preset: str) -> None:
    """The toy's sums do not depend on how many cores there are, unless the user says how many threads to use."""
    if preset == "toy" and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def run(*commands: list[str]) -> None:
    """Runs `torchrun COMMAND` for each, side by side, one thread each, apart from this process's group; waits for all.

    (Without torchrun itself, which is a process more, and would not hand on the status STOPPED.)
    SIGTERM is handed on (Ctrl-C reaches them by itself), and one that fails ends the others. Raises SystemExit: STOPPED
    where they stopped in order, else naming the command that failed.
    """
    environment = {k: v for k, v in os.environ.items() if k not in GROUP and not k.startswith("TORCHELASTIC")}
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    stages: list[subprocess.Popen] = []

    def stop(*_) -> None:
        for stage in stages:
            stage.terminate()

    before = {n: signal.signal(n, do) for n, do in ((signal.SIGTERM, stop), (signal.SIGINT, lambda *_: None))}
    for command in commands:
        print("$ torchrun", *command, flush=True)
        stages.append(subprocess.Popen([sys.executable, *command], env=environment))
    while not any(status := [stage.poll() for stage in stages]) and None in status:
        time.sleep(0.1)
    if None in status:
        stop()
    ended = [stage.wait() for stage in stages]
    for number, handler in before.items():
        signal.signal(number, handler)
    for code, command in zip(status, commands):
        if code and code not in (STOPPED, -signal.SIGTERM, -signal.SIGINT):
            raise SystemExit(f"'torchrun {' '.join(command)}' ended with status {code}: its message stands above")
    if any(ended):
        raise SystemExit(STOPPED)


def world_folder(settings) -> Path:
    """Where the world lies: --world, else in OUT or beside it. To be made: in GRPO's OUT, beside the others'."""
    if settings.world:
        return Path(settings.world)
    inside, beside = Path(settings.out) / "world", Path(settings.out).parent / "world"
    found = next((path for path in (inside, beside) if (path / "world.json").exists()), None)
    return found or (inside if isinstance(settings, GRPOSettings) else beside)


def make_world(settings, base: bool) -> Path:
    """Renders the embedded world, and trains its base model if `base`, where they are not there yet."""
    world = world_folder(settings)
    if not (world / (f"base/{WEIGHTS}" if base else "world.json")).exists():
        run(["-m", "erv_min.toy", str(world), "--seed", str(settings.seed), *([] if base else ["--clips-only"])])
    return world


def prepare_world(settings, processes: Processes, base: bool) -> Path:
    """`make_world` on the main process, while the others wait; names its folder in `settings`."""
    one_thread(settings.preset)
    settings.world = str(world_folder(settings))
    if processes.main:
        make_world(settings, base)
    barrier()
    return Path(settings.world)


def options(settings, usual, without: tuple[str, ...] = ()) -> list[str]:
    """What a user would type to get `settings` where a preset gives `usual`: an option for each field that differs."""
    words = []
    for field in dataclasses.fields(settings):
        value, option = getattr(settings, field.name), option_name(field.name)
        if dataclasses.is_dataclass(value):
            words += options(value, getattr(usual, field.name), without)
        elif field.name not in without and value != getattr(usual, field.name):
            words += [option if value else f"--no{option[1:]}"] if isinstance(value, bool) else [option, str(value)]
    return words


def prepare(settings: GRPOSettings, scripts: Path, processes: Processes) -> Processes:
    """Makes world, SFT, verifier and, where asked, the Baseline, each where it is not there yet; names them in `settings`.

    `scripts` is the folder of the stages' scripts. The main process makes them, the others wait. Returns the processes to
    go on with: see `second_process`. With --random-weights the world's text is all that is needed.
    """
    out, world, seed, todo = Path(settings.out), world_folder(settings), ["--seed", str(settings.seed)], []
    settings.world = str(world)
    human = ["--sources", "human"] if settings.ablate == "augmentation" else []  # table 2: a verifier of its own
    sft, verifier, baseline = out / "sft", out / ("erv-unaugmented" if human else "erv"), out / "baseline"
    same = ["--preset", "toy", "--world", str(world), *seed, "--device", settings.device or "cpu", "--resume"]
    if not settings.random_weights:
        one_thread(settings.preset)
        if not settings.model:
            settings.model = str(sft)
            todo += [] if (sft / WEIGHTS).exists() else [[str(scripts / "sft.py"), *same, "--out", str(sft)]]
        if settings.rewards.w_explanation and not settings.erv:
            settings.erv = str(verifier)
            command = [str(scripts / "erv.py"), *same, "--out", str(verifier), *human]
            todo += [] if (verifier / WEIGHTS).exists() else [command]
    if processes.main:
        make_world(settings, base=False)
        lap("world")
    if processes.main and not settings.random_weights:
        if todo:
            run(*todo)
            lap("base model, SFT and verifier")
        if settings.baseline and not (baseline / WEIGHTS).exists():
            own = ("out", "erv", "ablate", "w_explanation", "baseline", "eval_clips", "resume")
            run([str(scripts / "grpo.py"), *options(settings, TOY, own), "--out", str(baseline), "--w-explanation", "0",
                 "--eval-clips", "-1", "--resume"])
            lap("Baseline")
        processes = second_process(settings, scripts / "grpo.py", processes)
    barrier()
    return processes


def second_process(settings: GRPOSettings, script: Path, processes: Processes) -> Processes:
    """Makes this process, alone under torchrun and on the CPU, the first of two, starts the other, and joins it.

    They share each step's prompts, which pays better than two threads on matrices as small as the toy's, and repeats.
    Started as `python scripts/grpo.py`, without torchrun, the process stays alone, as where the prompts do not halve.
    """
    if os.environ.get("WORLD_SIZE") != "1" or processes.device.type != "cpu" or settings.batch_size % 2:
        return processes
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "TORCHELASTIC_USE_AGENT_STORE": "False"}  # a store of their own, which the first process holds
    other = subprocess.Popen([sys.executable, str(script), *options(settings, TOY)],
                             env=os.environ | {"RANK": "1", "LOCAL_RANK": "1", "OMP_NUM_THREADS": "1"})

    def watch() -> None:  # without it this process would wait an hour for one that never came to the group
        if (status := other.wait()) not in (0, STOPPED):
            print(f"the second process ended with status {status}: its message stands above", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    processes = join_processes(settings.device)
    open_folder(settings.out, settings.resume, processes)  # as the second process does where its script begins
    return processes


def compare(settings: GRPOSettings, collate: Collator, processes: Processes) -> None:
    """Held-out clips through SFT, the baseline where asked, and this run: a table like table 1, and evaluation.json."""
    examples = load_examples(f"toy:{settings.world}", "test")[: settings.eval_clips or None]
    name = "GRPO with R_E" if settings.rewards.w_explanation else "GRPO without R_E"
    systems = {"SFT": settings.model}
    if settings.baseline:
        systems["GRPO without R_E"] = f"{settings.out}/baseline"
    systems[name] = settings.out
    clips = {str(row["number"]): row for row in read_jsonl(Path(settings.world, "params.jsonl"))}
    judge, scores, counted = make_judge("lexicon"), {}, {}
    lap("GRPO")
    for system, folder in systems.items():
        own = Collator(load_humanomni(folder, torch.float32, processes.device), collate.tokenizer,
                       collate.gate_tokenizer, collate.cache, settings.modality, settings.prompt_stage)
        rows, _ = predict(own, examples, processes, Answers(
            temperature=settings.eval_temperature, max_new_tokens=settings.max_new_tokens, seed=settings.seed,
            **decoding(settings)), batch_size=64)
        if processes.main:
            judge_rows(rows, judge)
            scores[system] = score(rows, rows[0]["dataset"])
            counted[system] = count_sentences(rows, clips)
            write_jsonl(Path(settings.out, f"predictions-{system.replace(' ', '-')}.jsonl"), rows)
    if not processes.main:
        return
    write_json(Path(settings.out, "evaluation.json"), scores)
    print(f"\n{len(examples)} held-out clips, explanations judged by the lexicon, percent:\n{table(scores)}\n\nfiles: "
          + ", ".join(f"{k} {v}" for k, v in systems.items()) + f", evaluation {settings.out}/evaluation.json")
    print(f"{name} over SFT on {len(examples)} held-out clips: "
          + ", ".join(f"{m} {scores[name][m] - scores['SFT'][m]:+.1f}" for m in COLUMNS))
    for system, n in counted.items():
        print(f"{system}: {100 * n['format'] / len(examples):.1f}% of the outputs keep the format, "
              f"{percent(n['formed'], n['sentences'])} of the sentences belong to the grammar in the right person, "
              f"{percent(n['true'], n['cues'])} of those about face or voice are true of the clip")
    lap("evaluation")
    print("seconds: " + ", ".join(f"{what} {now - then:.0f}" for (_, then), (what, now) in zip(laps, laps[1:]))
          + f"; {(laps[-1][1] - laps[0][1]) / 60:.1f} minutes in all", flush=True)


def count_sentences(rows: list[dict], clips: dict[str, dict]) -> Counter:
    """check_sentences summed over predictions, and "format": outputs that keep it. clips: params.jsonl by video_id."""
    total = Counter(format=sum(int(format_reward(row["output"])) for row in rows))
    for row in rows:
        total.update(check_sentences(split_sentences(extract_explanation(row["output"])), clips[row["video_id"]]))
    return total


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "none"
