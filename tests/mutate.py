"""Would a wrong sign pass? One-line mutations of erv_min/ and scripts/, each with the test files that must fail.

    python tests/mutate.py [--only 3,17] [--jobs 2]

Each worker has a copy of the repository in a temporary folder. There it makes one mutation, runs the files named for it
until one fails, and puts the line back. Before, every file that will be asked runs once on the unchanged copy: a test
that fails anyway says nothing about a mutation. The survivors are printed, and the exit status is 1 if there are any.
Not part of the suite, which only checks that each line is still there (test_mutate.py).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 900  # seconds for one test file


def problems() -> Iterator[str]:
    """What is wrong with the list: an old text that does not stand exactly once, a test file that is not there."""
    for number, (file, old, new, tests) in enumerate(MUTATIONS):
        path = ROOT / file
        count = path.read_text().count(old) if path.is_file() else 0
        if count != 1 or old == new or "\n" in old + new:
            yield f"{number}: {file}: {old!r} stands there {count} times, and must be one line that changes"
        for name in tests.split():
            if not (ROOT / "tests" / name).is_file():
                yield f"{number}: {file}: no test file {name}"


def run_tests(copy: Path, names: list[str]) -> str:
    """Runs test files one after the other, until one fails: "survived", "killed by NAME", or why it cannot be told."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}  # a mutation keeps the size
    environment.setdefault("OMP_NUM_THREADS", "1")
    for name in names:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/{name}"]
        try:
            status = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=TIMEOUT).returncode
        except subprocess.TimeoutExpired:
            return f"{name} did not end within {TIMEOUT} s"
        if status == 1:
            return f"killed by {name}"
        if status != 0:
            return f"{name} could not run (pytest's exit status {status})"
    return "survived"


def mutated(copy: Path, file: str, old: str, new: str, tests: str) -> str:
    """The fate of one mutation in `copy`, which is as it was afterwards."""
    path = copy / file
    text = path.read_text()
    path.write_text(text.replace(old, new))
    try:
        return run_tests(copy, tests.split())
    finally:
        path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="numbers of mutations, separated by commas (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="how many run side by side (default: 2)")
    options = parser.parse_args()
    if wrong := list(problems()):
        sys.exit("\n".join(wrong))
    numbers = [int(x) for x in options.only.split(",") if x] or range(len(MUTATIONS))

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        copies = SimpleQueue()  # those that no worker is using
        for job in range(options.jobs):
            copy = Path(folder, str(job))
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("runs", ".git", "__pycache__", ".pytest_cache"))
            copies.put(copy)

        def in_a_copy(task, *arguments) -> str:
            copy = copies.get()
            try:
                return task(copy, *arguments)
            finally:
                copies.put(copy)

        names = sorted({name for number in numbers for name in MUTATIONS[number][3].split()})
        before = pool.map(lambda name: in_a_copy(run_tests, [name]), names)
        if failed := [fate for fate in before if fate != "survived"]:
            sys.exit("without any mutation: " + "; ".join(failed))
        left = 0
        for number, fate in zip(numbers, pool.map(lambda number: in_a_copy(mutated, *MUTATIONS[number]), numbers)):
            file, old, new, _ = MUTATIONS[number]
            left += not fate.startswith("killed")
            print(f"{number:3} {fate:40} {file}: {old} -> {new}", flush=True)
    print(f"{len(numbers)} mutations, {left} of them not killed")
    sys.exit(left > 0)


EQ1, EQ2, EQ3 = (f"equations/test_eq{x}.py" for x in ("1_prompt_and_sampling", "2_sft", "3_grpo"))
EQ4, EQ5 = "equations/test_algorithm1_eq4_explanation_reward.py", "equations/test_eq5_reward.py"
METRICS = "equations/test_metrics_eea_fcr_epc_war_uar.py"
RECORDED, PROMPTS = "parity/test_recorded_model.py", "parity/test_recorded_prompts.py"
REWARDS = "parity/test_recorded_rewards_and_step.py"
NUMBERS, RESUME = "promises/test_numbers.py", "promises/test_resume.py"
GRPO, SFT, ERV, TWO = (f"test_plain_{x}.py" for x in ("grpo", "sft", "erv", "processes"))

MUTATIONS = [  # file, a piece of one line that stands there once, what it becomes, the test files that must fail
    # ---- Eq. 3: advantages, KL, the clipped objective
    ("erv_min/grpo.py", "groups - groups.mean(", "groups + groups.mean(", EQ3),
    ("erv_min/grpo.py", "keepdim=True) + 1e-4", "keepdim=True) + 1e-2", EQ3),
    ("erv_min/grpo.py", "groups.std(1, keepdim=True)", "groups.std(1, keepdim=True, correction=0)", EQ3),
    ("erv_min/grpo.py", "group_size == 1 or not divide", "group_size == 1 or divide", EQ3),
    ("erv_min/grpo.py", "groups.amax(1, keepdim=True) == groups", "groups.amax(1, keepdim=True) != groups", EQ3),
    ("erv_min/grpo.py", "    d = ref_logps - logps", "    d = logps - ref_logps", EQ3),
    ("erv_min/grpo.py", "return d.exp() - d - 1", "return d.exp() + d - 1", EQ3),
    ("erv_min/grpo.py", "(ref_logps - logps) ** 2 / 2", "(ref_logps - logps) ** 2", EQ3),
    ("erv_min/grpo.py", "((values * mask).sum(1) /", "(values.sum(1) /", EQ3),
    ("erv_min/grpo.py", "max(1.0, batch[\"tokens\"]) / batch[\"completions\"]", "max(1.0, batch[\"tokens\"])", EQ3),
    ("erv_min/grpo.py", "== eos_token_id) & completions.mask)", "== eos_token_id))", EQ3),
    ("erv_min/grpo.py", "(ratio * A).minimum(", "(ratio * A).maximum(", EQ3),
    ("erv_min/grpo.py", "ratio.clamp(1 - epsilon, 1 + epsilon)", "ratio.clamp(1 - epsilon, 1 + 2 * epsilon)", EQ3),
    ("erv_min/grpo.py", "beta * kl - surrogate if", "beta * kl + surrogate if", EQ3),
    ("erv_min/grpo.py", "(beta * kl - ", "(kl - ", EQ3),
    ("erv_min/grpo.py", "logps - old_logps.detach(), adv", "old_logps.detach() - logps, adv", EQ3),
    ("erv_min/grpo.py", 'if kl_term == "k2" else', 'if kl_term != "k2" else', EQ3),
    ("erv_min/grpo.py", "ref_logps = ref_logps.detach()", "ref_logps = ref_logps + 0", EQ3),
    ("erv_min/grpo.py", "ratio.detach() * kl_k2(", "kl_k2(", EQ3),
    ("erv_min/grpo.py", "& (A >= 0)", "& (A > 0)", EQ3),
    ("erv_min/grpo.py", "MAX_LOG_RATIO = 80.0", "MAX_LOG_RATIO = 800.0", NUMBERS),
    ("erv_min/train/log.py", "low = (ratio < 1 - epsilon)", "low = (ratio < 1 + epsilon)", EQ3),
    ("erv_min/train/log.py", "(advantages[:, None] > 0) & inside", "(advantages[:, None] < 0) & inside", EQ3),
    ("erv_min/train/log.py", "part.completions.logps - part.old_logps", "part.completions.logps - logps",
     "test_step_metrics.py"),
    ("erv_min/train/log.py", "gap.amax(1)}", "gap.amin(1)}", "test_step_metrics.py"),
    ("erv_min/train/log.py", '1 - sum(row["ended"] for', 'sum(row["ended"] for', "test_step_metrics.py"),
    # ---- Eq. 4 and algorithm 1, Eq. 5
    ("erv_min/rewards.py", "(u > tau)", "(u >= tau)", EQ4),
    ("erv_min/rewards.py", "stable=True).flip(1)[:, :k]", "stable=True, descending=True)[:, :k]",
     REWARDS),
    ("erv_min/rewards.py", "best[: max(1, n)]", "best[:n]", EQ4),
    ("erv_min/rewards.py", "e_gt = canonical(e_gt)", "e_gt = e_gt", EQ4),
    ("erv_min/rewards.py", "c = sum(e_gt in EL for EL in sets)", "c = sum(e_gt in EL[:1] for EL in sets)", EQ4),
    ("erv_min/rewards.py", 'if neutral_filter and e_gt != "neutral" else N', "if neutral_filter else N", EQ4),
    ("erv_min/rewards.py", "if denominator > 0 else 0.0", "if denominator > 0 else 1.0", EQ4),
    ("erv_min/rewards.py", 'if neutral_rule == "only" else', 'if neutral_rule == "any" else', EQ4),
    ("erv_min/rewards.py", "settings.w_format * R_format", "settings.w_answer * R_format", EQ5),
    ("erv_min/rewards.py", "settings.w_explanation * R_E +", "R_E +", EQ5),
    ("erv_min/rewards.py", "labels, settings.tau, settings.k)", "labels, settings.tau)", EQ5),
    ("erv_min/rewards.py", "labels, settings.tau, settings.k)", "labels, k=settings.k)", EQ5),
    ("erv_min/rewards.py", "settings.ablate != \"neutral-filtering\"", "settings.ablate == \"neutral-filtering\"", EQ5),
    ("erv_min/rewards.py", "explanation_reward(EL, label, settings.neutral_rule, ",
     'explanation_reward(EL, label, "only", ', EQ5),
    ("erv_min/rewards.py", "answer_reward(o, label, name, settings.answer_rule)", "answer_reward(o, label, name)",
     EQ5),
    ("erv_min/rewards.py", "split_sentences(E, settings.sentence_rule)", "split_sentences(E)", EQ5),
    ("erv_min/rewards.py", 'completion.startswith("<think>") and', "True and", EQ5),
    ("erv_min/rewards.py", "normalize(answer, dataset, rule) == e_gt", "normalize(answer, dataset, rule) in e_gt",
     EQ5),
    ("erv_min/base/sentences.py", "if after % 2 == 0", "if after % 2 == 1", EQ4),
    ("erv_min/base/sentences.py", "(?<=[.!?])\\s+", "(?<=[.!])\\s+", EQ4),
    ("erv_min/emotions.py", '"contempt": 10,', '"contempt": 11,', "test_emotions.py"),
    ("erv_min/emotions.py", '| {"calm": "neutral"}', '| {"calm": "happiness"}', EQ4),
    ("erv_min/emotions.py", "emotion and LABEL_NAMES.get(name) == emotion", "emotion and name == emotion",
     "test_emotions.py"),
    # ---- the verifier
    ("erv_min/erv.py", "torch.sigmoid(self.model(*batch).float())", "self.model(*batch).float()", "test_erv.py"),
    ("erv_min/erv.py", "probs[[place[s] for s in sentences]]", "probs[[place[s] for s in place]]", "test_erv.py"),
    ("erv_min/erv.py", "(model.config.pad_token_id + 1)", "model.config.pad_token_id", "test_erv.py"),
    ("erv_min/train/log.py", 'sum(EL == ["neutral"] for EL', 'sum("neutral" in EL for EL', "test_erv.py"),
    ("erv_min/train/log.py", "len(set(reward.sentences)) /", "1 /", "test_erv.py"),
    ("erv_min/data/pairs.py", 'raw.get("truth", raw', 'raw.get("labels", raw', "test_erv.py"),
    ("erv_min/data/pairs.py", '{seed}:{row.key}', '{seed}:{row.text}', "test_erv.py"),
    ("erv_min/data/pairs.py", "[there > 0].mean()", "[there >= 0].mean()", "test_erv.py"),
    # ---- Eq. 2 and the log-probs that it shares with Eq. 3
    ("erv_min/sft.py", "return -logps", "return logps", EQ2),
    ("erv_min/sft.py", "mask.sum().clamp_min(1) if", "mask.numel() if", EQ2),
    ("erv_min/sft.py", "(start + i) % len(targets)", "start % len(targets)", "test_logps.py"),
    ("erv_min/sft.py", "(example.path, example.subtitle)", "(example.video_id,)", "test_logps.py"),
    ("erv_min/base/chunked.py", "if temperature == 1 else", "if temperature else", EQ2),
    ("erv_min/base/chunked.py", "= grad / ctx.temperature,", "= grad,", "test_logps.py"),
    ("erv_min/base/chunked.py", "mul(probs, -grad[part, None],", "mul(probs, grad[part, None],", "test_logps.py"),
    ("erv_min/base/chunked.py", "= -log_probs.exp()", "= log_probs.exp()", EQ2),
    ("erv_min/logps.py", "len(prompts.embeds), prompts.lengths - 1", "len(prompts.embeds), prompts.lengths - 2", "test_logps.py"),
    ("erv_min/logps.py", "torch.arange(1, length, dev", "torch.arange(0, length - 1, dev", "test_logps.py"),
    ("erv_min/logps.py", ".masked_fill(~mask, 0)", ".masked_fill(mask & False, 0)", NUMBERS),
    # ---- Eq. 1: sampling
    ("erv_min/generate.py", "dtype=torch.float64)", "dtype=torch.float32)", EQ1),
    ("erv_min/generate.py", "<= 1 - top_p", "< 1 - top_p", EQ1),
    ("erv_min/generate.py", "scores = logits.float() / temperature", "scores = logits.float()", EQ1),
    ("erv_min/generate.py", "key=[seed, step]", "key=[seed, 0]", "test_generate.py"),
    ("erv_min/generate.py", "counter=[0, 0, prompt, sample]", "counter=[0, 0, prompt, 0]", "test_generate.py"),
    ("erv_min/generate.py", "mask = ended.cumsum(1) == ended", "mask = ended.cumsum(1) == 0", "test_generate.py"),
    ("erv_min/generate.py", "prompts.lengths - 1]", "prompts.lengths - 2]", "test_generate.py"),
    ("erv_min/generate.py", "temperature, top_k, top_p)", "temperature, 0, top_p)", "test_generate.py"),
    ("erv_min/generate.py", "temperature, top_k, top_p)", "temperature, top_k)", "test_generate.py"),
    ("erv_min/generate.py", "eos_token_id, noise, temperature).ids", "eos_token_id, noise).ids", "test_generate.py"),
    # ---- Eq. 1: the model
    ("erv_min/model/qwen2.py", "torch.cat([-angles, angles]", "torch.cat([angles, -angles]", RECORDED),
    ("erv_min/model/qwen2.py", "inverse = theta ** -(", "inverse = 10000 ** -(", RECORDED),
    ("erv_min/model/attention.py", "v, is_causal=True,", "v, is_causal=False,", RECORDED),
    ("erv_min/model/attention.py", "alpha=width**-0.5", "alpha=1", "test_generate.py"),
    ("erv_min/model/attention.py", "length.device) <= self.length", "length.device) < self.length", "test_generate.py"),
    ("erv_min/model/attention.py", "device=mask.device).tril()", "device=mask.device)", "test_logps.py"),
    ("erv_min/model/qwen2.py", "F.silu(self.gate_proj(x))", "F.gelu(self.gate_proj(x))", RECORDED),
    ("erv_min/model/qwen2.py", "return x + self.mlp(", "return self.mlp(", RECORDED),
    ("erv_min/model/towers.py", "layers + 1 + select_layer", "layers + select_layer", RECORDED),
    ("erv_min/model/towers.py", 'nn.GELU(approximate="tanh")', "nn.GELU()", RECORDED),
    ("erv_min/model/towers.py", "key_bias=False", "key_bias=True", RECORDED),
    ("erv_min/model/towers.py", "return self.layer_norm(x)", "return x", RECORDED),
    ("erv_min/model/towers.py", "-math.log(10000)", "math.log(10000)", "test_model.py"),
    ("erv_min/model/bert.py", "* real + self.config.pad_token_id", "* real", "test_bert.py"),
    ("erv_min/model/bert.py", "self.dropout.p if self.training else 0.0", "self.dropout.p", "test_bert.py"),
    ("erv_min/model/bert.py", "self.dropout.p if self.training else 0.0", "0.0", "test_bert.py"),
    ("erv_min/model/projector.py", "[self.padding], 1, 0)", "[self.padding], 0, 1)", RECORDED),
    ("erv_min/model/projector.py", '), self.convolve("body", ', '), self.convolve("video", ', RECORDED),
    ("erv_min/model/projector.py", "round(inputs / 4)", "round(inputs / 2)", RECORDED),
    ("erv_min/model/humanomni.py", "kernel_size=3, stride=3)", "kernel_size=3, stride=3, padding=1)", RECORDED),
    ("erv_min/model/humanomni.py", ".softmax(-1)", ".sigmoid()", RECORDED),
    ("erv_min/model/humanomni.py", "targets = prompts.labels[:, 1:]", "targets = prompts.labels[:, :-1]", EQ2),
    ("erv_min/model/parameters.py", "startswith(prefixes) and name not in unused", "startswith(prefixes)",
     "test_model.py"),
    # ---- clips and prompts
    ("erv_min/media.py", "segment * (i + 0.5)", "segment * i", "test_media.py"),
    ("erv_min/media.py", "(torch.cat(out) / 255 - 0.5) / 0.5", "(torch.cat(out) / 255 - 0.5)", "test_media.py"),
    ("erv_min/media.py", "mel.max() - 8) + 4", "mel.max() - 8) - 4", "test_media.py"),
    ("erv_min/media.py", "spectrum.abs() ** 2", "spectrum.abs()", "test_media.py"),
    ("erv_min/prompts.py", "if subtitle else question", "if False else question", "test_prompts.py"),
    ("erv_min/prompts.py", '"grpo": QWEN2_VL + MOD', '"grpo": MOD', PROMPTS),
    ("erv_min/inputs.py", "question_with_subtitle(self.question, example.subtitle)", "self.question", "test_inputs.py"),
    ("erv_min/inputs.py", "render(question, self.modality, self.stage,", "render(question, self.modality,",
     "test_inputs.py"),
    ("erv_min/inputs.py", "gate_text(question, self.modality, self.stage)", "gate_text(question)", "test_inputs.py"),
    ("erv_min/data/cache.py", "|{stat.st_mtime_ns}|", "|", "test_data.py"),
    ("erv_min/data/cache.py", "|{self.key}", "", "test_data.py"),
    ("erv_min/train/start.py", "settings.modality, settings.geometry, settings.silence)",
     "settings.modality, settings.geometry)", "test_data.py"),
    ("erv_min/train/start.py", "settings.modality, settings.geometry, settings.silence)",
     "settings.modality, settings.silence)", "test_data.py"),
    ("erv_min/train/start.py", "about = (settings.dtype, settings.num_frames,", "about = (settings.dtype,",
     "test_data.py"),
    ("erv_min/train/start.py", "examples if settings.subtitles else", "examples if True else", "test_inputs.py"),
    ("erv_min/train/hooks.py", "taken += 1", "taken += 2", "test_data.py"),
    ("erv_min/train/hooks.py", "yield taken, x", "yield place, x", "test_data.py"),
    ("erv_min/data/loader.py", "manual_seed(seed * 1_000_003 + epoch)", "manual_seed(seed * 1_000_003)",
     "test_train.py"),
    ("erv_min/data/loader.py", "manual_seed(seed * 1_000_003 + epoch)", "manual_seed(epoch)", "test_train.py"),
    ("erv_min/data/readers.py", "in enumerate(names, 1)}", "in enumerate(names)}", "test_data.py"),
    # ---- answers and figures
    ("erv_min/train/answers.py", "settings.temperature, top_p=settings.top_p,", "settings.temperature,",
     "test_answers.py"),
    ("erv_min/train/answers.py", "settings.seed * 100_003 + n", "settings.seed * 100_003", "test_answers.py"),
    ("erv_min/train/answers.py", "sampling_noise(settings.seed, 0, list(decoded)", "sampling_noise(0, 0, list(decoded)",
     "test_answers.py"),
    ("erv_min/metrics.py", "eea = s.judged == s.truth", "eea = s.judged == s.predicted", METRICS),
    ("erv_min/metrics.py", "(s.judged < C) & (s.judged == s.answered)", "s.judged == s.answered", METRICS),
    ("erv_min/metrics.py", "eea & (s.answered == s.truth)", "eea & (s.predicted == s.truth)", METRICS),
    ("erv_min/metrics.py", "(there > 0).sum(1), 1)", "(there >= 0).sum(1), 1)", METRICS),
    ("erv_min/metrics.py", "(p_o - p_e) / (1 - p_e)}", "(p_o - p_e)}", "test_metrics.py"),
    ("erv_min/base/chat.py", "and not whole(text)", "and False", "test_judge.py"),
    ("erv_min/base/chat.py", "(after_thought(text), cut)", "(text, cut)", "test_judge.py"),
    ("erv_min/base/chat.py", "build_opener(AnyStatus)", "build_opener()", "test_judge.py"),
    ("erv_min/base/hub.py", "if wait is None or _refused(error)", "if True or _refused(error)", "test_hub.py"),
    ("erv_min/train/answers.py", "weights_key(collate.model)", "''", "test_evaluate.py"),
    ("erv_min/judge.py", "label_among(labels, re.sub", "label_among(ERV_LABELS, re.sub", "test_judge.py"),
    ("erv_min/judge.py", "labels[int(row.argmax())]", "labels[int(row.argmin())]", "test_judge.py"),
    ("erv_min/judge.py", "permuted(labels, text))", "labels)", "test_judge.py"),
    ("scripts/tools/survey.py", "max(0, top - above) / level", "max(0, top - above)", "test_survey.py"),
    ("scripts/tools/survey.py", 'paths[entry["dataset"], entry["video_id"]]',
     'next(x for (_, i), x in paths.items() if i == entry["video_id"])', "test_survey.py"),
    ("scripts/tools/report.py", 'run.paths.get((split, row["dataset"], row["video_id"]))',
     '{(x, i): path for (x, _, i), path in run.paths.items()}.get((split, row["video_id"]))', "test_report.py"),
    ("erv_min/base/progress.py", "RUNNING[-1:] == [self]", "True", "test_progress.py"),
    ("erv_min/train/folder.py", "time.time() - self.shown > 5", "time.time() - self.progress.last > 5", "test_progress.py"),
    # ---- training: schedule, update, processes, shards, states
    ("erv_min/train/optimizer.py", "peak * step / rising", "peak * (step + 1) / rising", "test_train.py"),
    ("erv_min/train/optimizer.py", "0.5 * (1 - math.cos(", "0.5 * (1 + math.cos(", "test_train.py"),
    ("erv_min/train/optimizer.py", "weight_decay=0.0,", "weight_decay=0.1,", "test_train.py"),
    ("erv_min/train/optimizer.py", "betas=(0.9, 0.999)", "betas=(0.9, 0.99)", "test_train.py"),
    ("erv_min/train/optimizer.py", "clip_gradients(max_grad_norm)", "clip_gradients(1e9)", "test_train.py"),
    ("erv_min/train/optimizer.py", "and math.isfinite(loss)", "and True", NUMBERS),
    ("erv_min/train/sharding.py", "flat.div_(size)", "flat", "test_train.py"),
    ("erv_min/base/processes.py", "for other in others), value)", "for other in others[:0]), value)", "test_train.py"),
    ("erv_min/base/processes.py", "for part in all_gather_object(rows) for row", "for part in [rows] for row",
     "test_train.py"),
    ("erv_min/base/processes.py", "range(self.rank, count, self.size)", "range(count // self.size)", "test_train.py"),
    ("erv_min/fsdp.py", "mean /= self.size", "mean /= 1", "test_fsdp.py"),
    ("erv_min/fsdp.py", "norm = total.sqrt()", "norm = total", "test_fsdp.py"),
    ("erv_min/train/folder.py", '"deterministic"}', '"deterministic", "beta"}', "test_train.py"),
    ("erv_min/train/folder.py", '"deterministic"}', '"deterministic", "tau"}', "test_train.py"),
    ("erv_min/train/folder.py", "self.skips[-TOO_MANY:] == [True] * TOO_MANY", "sum(self.skips) >= TOO_MANY", NUMBERS),
    ("erv_min/train/state.py", "states[at + keep :]", "states[at + keep + 1 :]", RESUME),
    ("erv_min/train/state.py", 'f"{key}.{name}", name).to(p)', 'f"exp_avg.{name}", name).to(p)', "test_train.py"),
    ("erv_min/train/settings.py", "if settings.train_projectors else", "if True else", "test_train.py"),
    # ---- found by reading file by file
    ("erv_min/inputs.py", "if len(set(gate_texts)) == 1:", "if len(set(gate_texts)) != 0:", "test_inputs.py"),
    ("erv_min/inputs.py", "if len(self.gate_ids) == 1 else", "if len(self.gate_ids) >= 1 else", "test_inputs.py"),
    ("erv_min/inputs.py", "vision.dim() == 5", "vision.dim() == 4", "test_inputs.py"),
    ("erv_min/inputs.py", "attention_mask=batch.attention_mask)", "attention_mask=None)", "test_inputs.py"),
    ("erv_min/inputs.py", "encode(example.begun, placeholders=False)", 'encode("")', "test_inputs.py"),
    ("erv_min/checkpoint.py", "if not override and any(", "if any(", "test_checkpoint.py"),
    ("erv_min/config.py", "((self.vision.grid + 1) // 2)", "(self.vision.grid // 2)", "test_model.py"),
    ("erv_min/config.py", "rope_theta: float = 1e6", "rope_theta: float = 1e4", "test_model.py"),
    ("erv_min/config.py", "num_frames: int = 8", "num_frames: int = 16", "test_model.py"),
    ("erv_min/erv.py", "(stop + 1 - start) > token_budget", "(stop - start) > token_budget", "test_erv.py"),
    ("erv_min/model/humanomni.py", "masked_fill(ids < 0, IGNORE)", "masked_fill(ids < -201, IGNORE)", EQ1),
    ("erv_min/model/humanomni.py", "attention_mask.bool()", "True", "test_model.py"),
    ("erv_min/model/parameters.py", "0.6 * module.in_features", "0.06 * module.in_features", "test_model.py"),
    ("erv_min/model/attention.py", "cat([self.prefix_mask,", "cat([~self.prefix_mask,", "test_generate.py"),
    ("erv_min/model/attention.py", "self.prefix = [(k[prompts], v[prompts])", "self.prefix = [(k[prompts], v[-prompts])",
     "test_generate.py"),
    ("erv_min/logps.py", 'joined("mask", False)', 'joined("mask", True)', "test_logps.py"),
    ("erv_min/logps.py", 'joined("ids", pad_id)', 'joined("ids", 0)', "test_logps.py"),
    ("erv_min/generate.py", "(logits.float() / temperature).log_softmax", "logits.float().log_softmax",
     "test_generate.py"),
    ("erv_min/generate.py", "noise[rows, t], temp", "noise[rows, 0], temp", "test_generate.py"),
    ("erv_min/fsdp.py", "(max_norm / (norm + 1e-6)).clamp(max=1)", "(max_norm / (norm + 1e-6))", "test_fsdp.py"),
    ("erv_min/train/state.py", 'if crc != files[name]["crc32"]', 'if crc == -1', RESUME),
    ("erv_min/train/folder.py", 'row["step"] < self.first_step', 'row["step"] <= self.first_step', "test_train.py"),
    ("erv_min/train/settings.py", '"audio_projector", "text_encoder")', '"audio_projector", "gate_mlp")',
     "test_train.py"),
    ("erv_min/train/start.py", "(model.model.vision_tower, model.model.audio_tower)", "(model.model.vision_tower,)",
     "test_data.py"),
    ("erv_min/train/hooks.py", "i * len(examples) // count", "i", "test_evaluate.py"),
    ("erv_min/train/answers.py", "settings.num_frames or model.config.num_frames", "model.config.num_frames",
     "test_answers.py"),
    ("erv_min/train/hooks.py", 'x[name] * x["n"] for x in scores', 'x[name] for x in scores', "test_answers.py"),
    ("erv_min/data/examples.py", "failed > allow_missing * total", "failed >= allow_missing * total", "test_data.py"),
    ("scripts/augment.py", ", (example.dataset, example.video_id)}", "}", "test_augment.py"),
    ("erv_min/base/decode.py", "a, d = rgb.swapaxes(0, 1), c, b", "a, d = rgb.swapaxes(0, 1), b, c", "test_media.py"),
    ("erv_min/media.py", "margins, value=127)", "margins, value=0)", "test_media.py"),
    ("erv_min/media.py", "(x_gap // 2, x_gap - x_gap // 2,", "(x_gap - x_gap // 2, x_gap // 2,", "test_media.py"),
    ("erv_min/media.py", "y_gap // 2, y_gap - y_gap // 2)", "y_gap - y_gap // 2, y_gap // 2)", "test_media.py"),
    ("erv_min/media.py", "(vertical @ x + 0.5).floor_()", "(vertical @ x).floor_()", "test_media.py"),
    ("erv_min/tokenizer.py", '{"<video>": VIDEO, "<audio>": AUDIO}', '{"<video>": AUDIO, "<audio>": VIDEO}',
     "test_prompts.py"),
    ("erv_min/base/bpe.py", '"normalized", "special")', '"special")', "test_prompts.py"),
    ("erv_min/base/bpe.py", '"lstrip", "rstrip", "normalized", "special")', '"lstrip", "rstrip", "normalized")', "test_prompts.py"),
    ("erv_min/tokenizer.py", 'self.encode("<|im_end|>\\n")', 'self.encode("<|im_end|>")', PROMPTS),
    ("erv_min/metrics.py", "np.maximum(there, 1)", "np.maximum(there, 2)", METRICS),
    ("erv_min/metrics.py", "[(1 - 0.95) / 2, (1 + 0.95) / 2]", "[(1 - 0.90) / 2, (1 + 0.90) / 2]", "test_metrics.py"),
    ("erv_min/judge.py", '"</think>" if "</think>" in rest', '"</think>" if True', "test_judge.py"),
    ("erv_min/emotions.py", "ALIASES.get(word) or SYNONYMS.get(word)", "ALIASES.get(word)", "test_emotions.py"),
    # ---- the scripts: what joins the equations
    ("scripts/grpo.py", "part.ref_logps, part.advantages,", "part.ref_logps, -part.advantages,", GRPO),
    ("scripts/grpo.py", "part.loss_mask, settings.beta,", "part.loss_mask, 0.0,", GRPO),
    ("scripts/grpo.py", "log_probs(reference, part,", "log_probs(policy, part,", GRPO),
    ("scripts/grpo.py", "logps, entropy = log_probs(policy, part, settings.temperature)",
     "logps, entropy = log_probs(policy, part, 1.0)", GRPO),
    ("scripts/grpo.py", "part.ref_logps, _ = log_probs(reference, part, settings.temperature)",
     "part.ref_logps, _ = log_probs(reference, part, 1.0)", GRPO),
    ("scripts/grpo.py", "settings.epsilon, settings.kl, length)", "0.2, settings.kl, length)", GRPO),
    ("scripts/grpo.py", "settings.epsilon, settings.kl, length)", 'settings.epsilon, "k3", length)', GRPO),
    ("scripts/grpo.py", "settings.kl, length)", "settings.kl)", GRPO),
    ("scripts/grpo.py", "(loss * part.share).backward()", "loss.backward()", GRPO),
    ("scripts/grpo.py", "settings.warmup, settings.schedule)", 'settings.warmup, "cosine")', GRPO),
    ("scripts/grpo.py", "settings.lr, settings.warmup,", "settings.lr, 0.0,", GRPO),
    ("scripts/grpo.py", "lr, settings.max_grad_norm,", "lr, 1.0,", GRPO),
    ("scripts/grpo.py", "range(settings.mu)", "range(1)", GRPO),
    ("scripts/grpo.py", "                                  settings.mask_truncated)",
     "                                  False)", GRPO),
    ("scripts/grpo.py", 'divide=settings.advantages == "grpo"', "divide=True", GRPO),
    ("scripts/grpo.py", "if part.old_logps is None:", "if True:", GRPO),
    ("scripts/grpo.py", "torch.tensor([each.total for", "torch.tensor([each.answer for", GRPO),
    ("erv_min/train/hooks.py", "settings.temperature, settings.top_k))", "settings.temperature))", GRPO),
    ("erv_min/train/hooks.py", "sampling_noise(settings.seed, step,", "sampling_noise(0, step,", "test_generate.py"),
    ("erv_min/train/log.py", "part.share / self.run.processes.size", "part.share", TWO),
    ("erv_min/train/log.py", 'all_reduce_sum({"loss": self.under_way})["loss"]', "self.under_way", TWO),
    ("erv_min/train/log.py", "gather_lists(self.sums[-len(rewards) :])", "self.sums", TWO),
    ("erv_min/grpo.py", "batch = all_reduce_sum(", "batch = dict(", TWO),
    ("scripts/sft.py", '["tokens" if settings.loss_reduction == "mean" else "targets"]', '["tokens"]', SFT),
    ("scripts/sft.py", "(loss * processes.size).backward()", "loss.backward()", TWO),
    ("scripts/sft.py", "settings.warmup, settings.schedule)", 'settings.warmup, "cosine")', SFT),
    ("scripts/erv.py", "len(part) / len(picked)", "1", TWO),
    ("scripts/erv.py", "processes.size + processes.rank)", "processes.size)", TWO),
]


if __name__ == "__main__":
    main()
