"""One clip in, explanation and emotion out: `scripts/infer.py clip.mp4 --model FOLDER_OR_REPO [...]`

Clips may be files, folders, or text files with a path per line. On a terminal the answer appears as it is sampled. The
prompt and the temperature are section 4.3's; released ones were evaluated with --geometry stretch (divergence 11).
--explain-reward happy --erv FOLDER shows what the verifier reads in each sentence, and R_E for that label (Eq. 4).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from erv_min.base.decode import frame_files
from erv_min.base.errors import ClipError, DataError, SettingsError
from erv_min.base.files import read_text
from erv_min.base.options import checked, option, parser_for
from erv_min.base.processes import join_processes, run_script
from erv_min.data.readers import CLIP_SUFFIXES, clips_in
from erv_min.emotions import to_erv
from erv_min.erv import Verifier
from erv_min.rewards import RewardSettings, explanation_reward, select_labels, sentences_of
from erv_min.train.answers import answers
from erv_min.train.settings import AnswerSettings
from erv_min.train.start import check_names, load_collator


def find_clips(names: list[str]) -> list[Path]:
    """Files, folders (of frames, or of clips, sorted) and lists (.txt, a path per line, relative to it) -> clips."""
    clips = []
    for path in map(Path, names):
        if path.suffix == ".txt":
            clips += [path.parent / line.strip() for line in read_text(path).splitlines() if line.strip()]
        else:
            clips += clips_in(path) if path.is_dir() and not frame_files(path) else [path]
    if not clips:
        raise DataError(f"{', '.join(names)}: no clip is named there, or in it ({', '.join(CLIP_SUFFIXES)})")
    if missing := [path for path in clips if not path.exists()]:
        raise DataError(f"{missing[0]}: no such file ({len(missing)} of {len(clips)} clips are not there)")
    return clips


class Stream:
    """Shows an answer while it is sampled: prints what each token adds to the text."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def __call__(self, ids: torch.Tensor) -> None:
        self.ids.append(int(ids[0]))
        text = self.tokenizer.decode(self.ids, skip_special=True)
        if text.startswith(self.shown) and not text.endswith("\ufffd"):  # half a character waits for its other half
            print(text[len(self.shown):], end="", flush=True)
            self.shown = text


def explain_reward(output: str, e_gt: str, verifier: Verifier, settings: RewardSettings = RewardSettings()) -> dict:
    """{"R_E", "label", "sentences": [{"text", "labels": {label: probability}}]} of an output, Eq. 4 taken apart."""
    sentences = sentences_of(output, settings)
    probs = verifier.probabilities(sentences)
    chosen = select_labels(probs, verifier.labels, settings.tau, settings.k)
    column = {label: i for i, label in enumerate(verifier.labels)}
    return {"R_E": explanation_reward(chosen, e_gt, settings.neutral_rule), "label": e_gt,
            "sentences": [{"text": text, "labels": {label: round(float(row[column[label]]), 3) for label in EL}}
                          for text, row, EL in zip(sentences, probs, chosen)]}


@dataclass
class InferSettings(AnswerSettings):
    subtitle: str = option("", "what is said in the clip, for the prompt")
    json: bool = option(False, "one JSON object per clip instead of text")
    explain_reward: str = option("", "show each sentence's emotions and R_E for this label (Eq. 4)")
    erv: str = option("", "the verifier for it: a folder or a hub repository")
    tau: float = option(0.5, "its threshold (release: 0.1; divergence 1)", least=0, most=1)


def main(argv: list[str] | None = None) -> None:
    parser = parser_for(InferSettings, __doc__)
    parser.add_argument("clips", nargs="+", help="clips, folders of clips, or .txt files with a path per line")
    given = vars(parser.parse_args(argv))
    names, settings = given.pop("clips"), checked(parser, InferSettings, given)
    if not settings.model:
        raise SettingsError("--model: name a checkpoint, a folder or a hub repository")
    if bool(settings.explain_reward) != bool(settings.erv):
        raise SettingsError("--explain-reward LABEL and --erv FOLDER go together")
    if settings.explain_reward:
        to_erv(settings.explain_reward)  # an unknown label is said before the model is loaded
    clips, processes = find_clips(names), join_processes(settings.device)
    check_names(settings)
    policy = load_collator(settings, processes)
    verifier = Verifier.load(settings.erv, processes.device) if settings.erv else None
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack a letter of the answer
    live, failed = not settings.json and sys.stdout.isatty(), 0
    found = answers(policy, clips, settings, settings.subtitle, (lambda ids: stream(ids)) if live else None)
    for path in clips:
        if not settings.json and len(clips) > 1:
            print(f"== {path}", flush=True)
        stream = Stream(policy.tokenizer)
        said = next(found)
        if isinstance(said, ClipError):
            failed += 1
            print(f"ClipError: {said}", file=sys.stderr)
            continue
        row = {"clip": str(path), "emotion": said.emotion, "explanation": said.explanation, "output": said.text}
        if verifier:
            row["reward"] = explain_reward(said.text, settings.explain_reward, verifier,
                                           RewardSettings(tau=settings.tau))
        if settings.json:
            print(json.dumps(row, ensure_ascii=False), flush=True)
            continue
        print("" if live else said.text, flush=True)  # on a terminal it stands there already
        if verifier:
            for sentence in row["reward"]["sentences"]:
                labels = ", ".join(f"{name} {p:.2f}" for name, p in sentence["labels"].items())
                print(f"  [{labels}] {sentence['text']}")
            print(f"  R_E for {settings.explain_reward}: {row['reward']['R_E']:.3f}", flush=True)
    if failed:
        sys.exit(f"{failed} of {len(clips)} clips could not be decoded")


if __name__ == "__main__":
    run_script(main)
