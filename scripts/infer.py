"""One clip in, explanation and emotion out: `scripts/infer.py clip.mp4 --model FOLDER_OR_REPO [...]`

Clips may be files, folders, or text files with a path a line. On a terminal the answer appears as it is sampled. The
prompt and the temperature are section 4.3's; released ones were evaluated with --geometry stretch (divergence 11).
--explain-reward happy --erv FOLDER shows what the verifier reads in each sentence, and R_E for that label (Eq. 4).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from erv_min.data.readers import Example
from erv_min.emotions import to_erv
from erv_min.run.errors import ClipError, DataError, SettingsError
from erv_min.erv import Verifier
from erv_min.generate import rollout, sampling_noise
from erv_min.inputs import Collator, clip_inputs, embed
from erv_min.run.processes import run_script
from erv_min.data.readers import CLIP_SUFFIXES, read_text
from erv_min.rewards import (RewardSettings, explanation_reward, extract_answer, extract_explanation, select_labels,
                             sentences_of)
from erv_min.run.settings import Answers, checked, parser_for, setting
from erv_min.run.start import load_policy
from erv_min.run.processes import join_processes


def find_clips(names: list[str]) -> list[Path]:
    """Files, folders (their clips, sorted) and lists (.txt, a path a line, relative to the list) -> paths of clips."""
    clips = []
    for path in map(Path, names):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in (*CLIP_SUFFIXES, ".gif"))
            if not found:
                raise DataError(f"{path}: no clip in it ({', '.join(CLIP_SUFFIXES)})")
            clips += found
        elif path.suffix == ".txt":
            clips += [path.parent / line.strip() for line in read_text(path).splitlines() if line.strip()]
        else:
            clips.append(path)
    return clips


class Stream:
    """Shows an answer while it is sampled: prints what each token adds to the text."""

    def __init__(self, tokenizer, file=sys.stdout):
        self.tokenizer, self.file, self.ids, self.shown = tokenizer, file, [], ""

    def __call__(self, ids: torch.Tensor) -> None:
        self.ids.append(int(ids[0]))
        text = self.tokenizer.decode(self.ids, skip_special=True)
        if text.startswith(self.shown) and not text.endswith("\ufffd"):  # half a character waits for its other half
            print(text[len(self.shown):], end="", file=self.file, flush=True)
            self.shown = text


@torch.no_grad()
def answer(builder: Collator, inputs, settings: Answers, on_token=None) -> str:
    """The model's output for one clip, as text."""
    length, temperature = settings.max_new_tokens, settings.temperature
    noise = sampling_noise(settings.seed, 0, [0], 1, length) if temperature > 0 else None
    completions = rollout(builder.model, embed(builder.model, builder([inputs])), 1, length, builder.tokenizer.eos_id, noise,
                          temperature, top_p=settings.top_p, on_token=on_token)
    return builder.tokenizer.decode(completions.ids[0][completions.mask[0]].tolist(), skip_special=True)


def explain_reward(output: str, e_gt: str, verifier: Verifier, settings: RewardSettings = RewardSettings()) -> dict:
    """{"R_E", "label", "sentences": [{"text", "labels": {label: probability}}]} of an output, Eq. 4 taken apart."""
    sentences = sentences_of(output, settings)
    probs = verifier.probabilities(sentences)
    chosen = select_labels(probs, verifier.labels, settings.tau, settings.k)
    column = {label: i for i, label in enumerate(verifier.labels)}
    return {"R_E": explanation_reward(chosen, e_gt, settings.neutral_rule, settings.neutral_filter), "label": e_gt,
            "sentences": [{"text": text, "labels": {label: round(float(row[column[label]]), 3) for label in EL}}
                          for text, row, EL in zip(sentences, probs, chosen)]}


@dataclass
class InferSettings(Answers):
    subtitle: str = setting("", "what is said in the clip, for the prompt")
    json: bool = setting(False, "one JSON object a clip instead of text")
    explain_reward: str = setting("", "show each sentence's emotions and R_E for this label (Eq. 4)")
    erv: str = setting("", "the verifier for it: a folder or a hub repository", path="hub")
    tau: float = setting(0.5, "its threshold (release: 0.1; divergence 1)", least=0, most=1)


def main(argv: list[str] | None = None) -> None:
    parser = parser_for(InferSettings, __doc__)
    parser.add_argument("clips", nargs="+", help="clips, folders of clips, or .txt files with a path a line")
    given = vars(parser.parse_args(argv))
    names, args = given.pop("clips"), checked(parser, InferSettings, given)
    if not args.model:
        raise SettingsError("--model: name a checkpoint, a folder or a hub repository")
    if bool(args.explain_reward) != bool(args.erv):
        raise SettingsError("--explain-reward LABEL and --erv FOLDER go together")
    if args.explain_reward:
        to_erv(args.explain_reward)  # an unknown label is said before the model is loaded
    clips, processes = find_clips(names), join_processes(args.device)
    builder = load_policy(args, processes, lambda line: print(line, file=sys.stderr))
    verifier = Verifier.load(args.erv, processes.device) if args.erv else None
    examples = [Example(path.stem, path, "", "", subtitle=args.subtitle) for path in clips]
    num_frames = args.num_frames or builder.model.config.num_frames
    stream = clip_inputs(examples, builder.model.config, None, args.modality, num_frames, args.geometry,
                         workers=2 if len(clips) > 1 else 0)
    failed = 0
    for path, inputs in zip(clips, stream):
        if isinstance(inputs, ClipError):
            failed += 1
            print(f"ClipError: {inputs}", file=sys.stderr)
            continue
        live = not args.json and sys.stdout.isatty()
        if not args.json and len(clips) > 1:
            print(f"== {path}")
        output = answer(builder, inputs, args, Stream(builder.tokenizer) if live else None)
        result = {"clip": str(path), "emotion": extract_answer(output), "explanation": extract_explanation(output),
                  "output": output}
        if verifier:
            result["reward"] = explain_reward(output, args.explain_reward, verifier, RewardSettings(tau=args.tau))
        if args.json:
            print(json.dumps(result, ensure_ascii=False), flush=True)
            continue
        print("" if live else output)
        if verifier:
            for sentence in result["reward"]["sentences"]:
                marks = ", ".join(f"{label} {p:.2f}" for label, p in sentence["labels"].items())
                print(f"  [{marks}] {sentence['text']}")
            print(f"  R_E for {args.explain_reward}: {result['reward']['R_E']:.3f}")
    if failed:
        sys.exit(f"{failed} of {len(clips)} clips could not be decoded")


if __name__ == "__main__":
    run_script(main)
