"""The toy's stages before GRPO and its table after it: the whole method from nothing, by commands a user could type.

    world, rendered -> base model -> SFT -> verifier -> GRPO without R_E | GRPO with R_E -> table 1 on held-out clips

Each process of the toy computes on one thread: sums then run in one order, and a seed gives the same table to the last
digit, however many cores there are and whatever else the machine does.
"""

import os
import sys
from pathlib import Path

import torch

import erv_min.toy.judges  # noqa: F401  registers them: lexicon, paraphrases
from erv_min.base.errors import SettingsError
from erv_min.base.files import read_json, write_json, write_jsonl
from erv_min.base.options import file_list
from erv_min.base.processes import Processes, barrier
from erv_min.base.weights import WEIGHTS
from erv_min.checkpoint import load_humanomni
from erv_min.data.examples import load_examples
from erv_min.data.pairs import read_rows
from erv_min.inputs import Collator
from erv_min.judge import make_judge
from erv_min.metrics import COLUMNS, table
from erv_min.toy.launch import Stage, become, run
from erv_min.train.folder import LOCKS
from erv_min.train.hooks import evaluation_rows, judged
from erv_min.train.settings import ERVSettings, GRPOSettings, SFTSettings


def one_thread(preset: str) -> None:
    """Unless the user says how many threads to use."""
    if preset == "toy" and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def world_stages(settings, base: bool = False) -> list[Stage]:
    """Names the world's folder in `settings`: --world, whatever its seed, else "world" in GRPO's OUT, and beside the
    OUT of the stages before it. Returns what makes it, with its base model if `base`: nothing if it is there. Raises
    SettingsError if one of another seed lies there."""
    one_thread(settings.preset)
    if settings.data and isinstance(settings, ERVSettings):  # what is not there is told before minutes of rendering
        read_rows(file_list(settings.data))
    elif settings.data:
        load_examples(settings.data)
    out = Path(settings.out)
    world = Path(settings.world or (out if isinstance(settings, GRPOSettings) else out.parent) / "world")
    there = world / "world.json"
    seed = read_json(there).get("settings", {}).get("seed") if there.exists() else settings.seed
    if seed != settings.seed and not settings.world:
        raise SettingsError(f"{world}: holds a world of seed {seed}, not {settings.seed}: give another --out, or "
                            f"--world {world} to take it all the same")
    settings.world = str(world)
    if getattr(settings, "cache_features", "") == "WORLD/features":
        settings.cache_features = f"{world}/features"  # the towers see each clip once, for all stages
    if (world / "base" / WEIGHTS if base else there).exists():
        return []
    command = ["-m", "erv_min.toy", settings.world, "--seed", str(settings.seed)]
    return [([command], 2) if base else ([[*command, "--clips-only"]], 1)]


def make(stages: list[Stage], processes: Processes) -> None:
    """The main process runs the stages, the others wait. A folder that holds WEIGHTS, written last, is done."""
    if processes.main:
        for stage in stages:
            run(*stage)
    barrier()


def prepare_sft(settings: SFTSettings, processes: Processes) -> None:
    """Makes the world and its base model, if they are not there yet; names them in `settings`."""
    if settings.preset == "toy" or settings.random_weights:
        base = not (settings.model or settings.random_weights)
        make(world_stages(settings, base), processes)
        settings.model = f"{settings.world}/base" if base else settings.model


def prepare_erv(settings: ERVSettings, processes: Processes) -> None:
    """Fills in the world's files that the command does not name, and makes the world if it is not there yet."""
    from_scratch = settings.init.startswith("scratch:")
    complete = settings.data and (settings.tokenizer or not from_scratch)
    if complete or settings.preset != "toy" and not settings.random_weights:
        return
    make(world_stages(settings), processes)
    if not settings.data:
        settings.data = f"{settings.world}/erv_train.jsonl"
        settings.valid = settings.valid or f"{settings.world}/erv_valid.jsonl"
    if from_scratch:
        settings.tokenizer = settings.tokenizer or f"{settings.world}/tokenizers/erv"


def prepare(settings: GRPOSettings, scripts: Path, processes: Processes) -> None:
    """Makes world, SFT, verifier and the table's Baseline, each if it is not there yet, by the stages' scripts in the
    folder `scripts`; names them in `settings`. Other presets start from what they name, and end without a table.

    A process that is alone under torchrun on a CPU gives each stage to two, which share a step's prompts (that pays
    better than two threads on matrices as small as the toy's), and does not return: after them the Baseline and this
    run are trained side by side, in one process each, and two make the table. `python scripts/grpo.py` stays alone, and
    so does a batch that does not halve.
    """
    if settings.preset != "toy" or settings.random_weights or settings.data:
        settings.eval_clips = -1  # no table (other data: scripts/evaluate.py on its own test split)
    if settings.random_weights:  # the world's text is all that is needed
        return make(world_stages(settings), processes)
    if settings.preset != "toy":
        return
    out = Path(settings.out)
    stages = world_stages(settings, base=not (settings.model or (out / "sft" / WEIGHTS).exists()))
    several = 2 if processes.device.type == "cpu" and settings.batch_size % 2 == 0 else 1
    same = ["--preset", "toy", "--world", settings.world, "--seed", str(settings.seed), "--resume",
            "--device", settings.device or processes.device.type, *["--deterministic"] * settings.deterministic]

    def made(script: str, name: str, *more: str) -> str:
        if not (out / name / WEIGHTS).exists():
            stages.append(([[str(scripts / script), *same, "--out", str(out / name), *more]], several))
        return str(out / name)

    settings.model = settings.model or made("sft.py", "sft")
    if settings.w_explanation and not settings.erv:
        table_2 = settings.ablate == "augmentation"  # a verifier of its own
        settings.erv = made("erv.py", "erv-unaugmented", "--sources", "human") if table_2 else made("erv.py", "erv")
    settings.baseline = bool(settings.baseline and settings.w_explanation and settings.eval_clips >= 0)
    ours = [str(scripts / "grpo.py"), *sys.argv[1:]]
    without = "--w-explanation 0 --eval-clips -1 --resume --erv= --ablate=".split()
    baseline = [*ours, "--world", settings.world, "--model", settings.model, *without, "--out", str(out / "baseline")]
    training = [baseline] if settings.baseline and not (out / "baseline" / WEIGHTS).exists() else []
    if os.environ.get("WORLD_SIZE") == "1" and several > 1:
        after = [([ours], several)]
        if settings.baseline:
            after = [([*training, [*ours, "--eval-clips", "-1"]], 1), ([[*ours, "--resume"]], several)]
        return become(stages, [lock.fileno() for lock in LOCKS], after)
    make(stages + [(training, 1)] * bool(training), processes)


def compare(settings: GRPOSettings, collate: Collator, processes: Processes) -> None:
    """Held-out clips through SFT, the Baseline and this run, each in its turn `collate`'s model: a table like table 1,
    in words what it shows, and evaluation.json. Nothing if --eval-clips is -1."""
    if settings.eval_clips < 0:
        return
    examples = load_examples(f"toy:{settings.world}", "test")[: settings.eval_clips or None]
    name = "GRPO with R_E" if settings.w_explanation else "GRPO without R_E"
    baseline = {"GRPO without R_E": f"{settings.out}/baseline"} if settings.baseline else {}
    systems = {"SFT": settings.model, **baseline, name: settings.out}
    judge, scores = make_judge("lexicon"), {}
    for system, folder in systems.items():
        collate.model = load_humanomni(folder, torch.float32, processes.device).requires_grad_(False)
        rows = evaluation_rows(collate, examples, processes, settings, settings.seed, 64)
        if processes.main:
            (scores[system],) = judged(rows, judge)
            write_jsonl(Path(settings.out, f"predictions-{system.replace(' ', '-')}.jsonl"), rows)
    if not processes.main:
        return
    write_json(Path(settings.out, "evaluation.json"), scores)
    print(f"\n{len(examples)} held-out clips, explanations judged by the lexicon, percent:\n{table(scores)}\n\n"
          f"{name} over SFT on {len(examples)} held-out clips: "
          + ", ".join(f"{m} {scores[name][m] - scores['SFT'][m]:+.1f}" for m in COLUMNS))
    if settings.baseline:
        print(movement(*scores.values())[0])


def movement(sft: dict, baseline: dict, ours: dict) -> tuple[str, bool]:
    """What table 1's three rows {metric: percent} show, in the paper's words from 10 points on; and whether it is the
    paper's movement: SFT explains what it answers; answers alone become right and come apart from the explanations;
    R_E keeps them together and makes them true, and costs no answers."""
    apart, right = baseline["EPC"] - sft["EPC"], baseline["WAR"] - sft["WAR"]
    together, true = ours["EPC"] - baseline["EPC"], ours["EEA"] - baseline["EEA"]
    first, second = "take" if apart <= -10 else "do not take", "brings" if together >= 10 else "does not bring"
    bounds = [sft["EPC"] >= 60, apart <= -10, right >= 10, ours["EPC"] >= sft["EPC"] - 5,
              ours["WAR"] >= baseline["WAR"] - 3]
    bounds += [ours[name] >= max(sft[name], baseline[name]) + 10 for name in ("EEA", "FCR")]
    text = (f"Rewards for answers alone {first} explanations and answers apart (EPC {apart:+.1f}, WAR {right:+.1f} "
            f"over SFT); R_E {second} them together (EPC {together:+.1f}, EEA {true:+.1f} over GRPO without it)")
    return text, all(bounds)
