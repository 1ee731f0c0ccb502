"""What a training loop calls beside its equations: this process's clips, the reward of completions, held-out clips."""

from collections.abc import Iterator
from pathlib import Path

from erv_min.base.errors import ClipError, SettingsError
from erv_min.base.files import append_jsonl, read_jsonl
from erv_min.base.processes import Processes, gather_lists
from erv_min.data.examples import check_clips, load_examples, too_many
from erv_min.data.loader import clip_inputs, item_at, steps_per_epoch
from erv_min.erv import Verifier
from erv_min.generate import rollout, sampling_noise
from erv_min.grpo import MiniBatch
from erv_min.inputs import Collator, Example, Inputs
from erv_min.judge import Judge, judge_rows, make_judge
from erv_min.logps import Completions
from erv_min.metrics import score
from erv_min.model.humanomni import Prompts
from erv_min.rewards import Reward, score_completions
from erv_min.tokenizer import Tokenizer
from erv_min.train.answers import predict
from erv_min.train.settings import AnswerSettings, GRPOSettings, PolicySettings
from erv_min.train.start import clip_options


class TrainingClips:
    """This process's clips of each step, decoded ahead, in the order of training."""

    def __init__(self, settings: PolicySettings, processes: Processes, units: list[list[Example]], per_step: int):
        """units: examples that share a clip (GRPO: one; SFT: a clip's targets); per_step: of them, on all processes."""
        self.settings, self.units, self.per_step = settings, units, per_step
        self.places = processes.share(per_step)  # of the places 0 .. per_step - 1 of a step
        self.total_steps = settings.steps or settings.epochs * steps_per_epoch(len(units), per_step)
        self.failed, self.failures = [], Path(settings.out) / "failed_clips.jsonl"

    def unit_at(self, place: int) -> list[Example]:
        """What stands at a place of the endless order."""
        return self.units[item_at(place, len(self.units), self.per_step, self.settings.seed)]

    def start(self, first_step: int, collate: Collator) -> None:
        """Begins to decode for `collate`, at the clips of `first_step`. What failed before a resume still counts."""
        if first_step and self.failures.exists():
            self.failed = [row["error"] for row in read_jsonl(self.failures, log=True)]
        places = [step * self.per_step + place for step in range(first_step, self.total_steps) for place in self.places]
        self.stream = self.inputs(places, config=collate.model.config, cache=collate.cache,
                                  **clip_options(self.settings))

    def inputs(self, places: list[int], **how) -> Iterator[tuple[int, Inputs]]:
        """(place, Inputs) for each of `places`: equal work, whatever breaks. The place that comes out is the one whose
        example it is. Raises ClipError if no clip can be decoded. `how`: `clip_inputs`' other arguments."""
        for place, x in zip(places, clip_inputs([self.unit_at(place)[0] for place in places], **how)):
            taken = place
            while isinstance(x, ClipError):
                self._failed(place, x)
                taken += 1
                if taken == place + 2 * len(self.units):  # among so many places stands every example
                    raise ClipError(f"none of the {len(self.units)} clips could be decoded, the last: {x}")
                (x,) = clip_inputs([self.unit_at(taken)[0]], **how | {"workers": 0})
            yield taken, x

    def next(self) -> list[Inputs]:
        """A step's clips; one that cannot be decoded is replaced by the next of the order. `taken`: their places."""
        self.taken, inputs = zip(*(next(self.stream) for _ in self.places))
        return list(inputs)

    def _failed(self, place: int, error: ClipError) -> None:
        append_jsonl(self.failures, {"step": place // self.per_step, "error": str(error)})
        self.failed.append(str(error))

    def check_failed(self) -> None:
        """Raises DataError if more clips broke than --allow-missing, over all processes, which all must call it; one
        that two of them met in different epochs counts once."""
        self.failed = [*dict.fromkeys(gather_lists(self.failed))]
        too_many(len(self.failed), len(self.units), self.settings.allow_missing, "".join(self.failed[:1]))


def step_rewards(minibatches: list[MiniBatch], tokenizer: Tokenizer, verifier: Verifier | None,
                 settings: GRPOSettings) -> tuple[list[str], list[Reward]]:
    """The completions as text, and R of each (Eq. 5), in the order of the mini-batches' rows; the verifier reads every
    distinct sentence of them in one call."""
    texts = [tokenizer.decode(ids[mask].tolist(), skip_special=True) for part in minibatches
             for ids, mask in zip(part.completions.ids, part.completions.mask)]
    examples = [x for part in minibatches for x in part.prompts.examples for _ in range(settings.group_size)]
    probabilities, labels = (verifier.probabilities, verifier.labels) if verifier else (None, ())
    return texts, score_completions(texts, [x.label for x in examples], [x.dataset for x in examples], probabilities,
                                    labels, settings)


class HeldOut:
    """EEA and EPC of up to 64 held-out clips, every --watch-every steps, judged by --watch-erv, or in the embedded
    world by its lexicon. Nothing if --watch-every is 0."""

    def __init__(self, settings: GRPOSettings, processes: Processes):
        self.settings, self.processes, self.examples = settings, processes, []
        data = settings.data or f"toy:{settings.world}"
        if not settings.watch_every:
            return
        if not settings.watch_erv and not data.startswith("toy:"):
            raise SettingsError(f"--watch-every {settings.watch_every}: name a judge, --watch-erv FOLDER_OR_REPO "
                                "(another verifier than --erv), or --watch-every 0")
        examples = check_clips(load_examples(data, "test"), settings.allow_missing)
        count = min(64, len(examples))
        self.examples = [examples[i * len(examples) // count] for i in range(count)]  # evenly spaced
        self.judge = make_judge(f"erv:{settings.watch_erv}" if settings.watch_erv else "lexicon",
                                device=processes.device)

    def __call__(self, policy, collate: Collator, step: int) -> dict[str, float]:
        """Percent over all held-out clips; {} unless it is due, and on another process than the main one. The noise is
        not the training's, and each call's is the same: calls differ by the policy alone."""
        if not self.examples or step % self.settings.watch_every:
            return {}
        with policy.unsharded():
            rows = evaluation_rows(collate, self.examples, self.processes, self.settings, self.settings.seed + 2**32,
                                   self.settings.batch_size // self.processes.size)
        if not self.processes.main or not rows:
            return {}
        scores = judged(rows, self.judge)
        return {f"held_out_{name}": sum(x[name] * x["n"] for x in scores) / len(rows) for name in ("EEA", "EPC")}


def evaluation_rows(collate: Collator, examples: list[Example], processes: Processes, settings: GRPOSettings, seed: int,
                    batch_size: int) -> list[dict]:
    """A policy's answers at --eval-temperature. This process decodes: the other ones do so for the training."""
    how = AnswerSettings(temperature=settings.eval_temperature, max_new_tokens=settings.max_new_tokens, seed=seed,
                         **clip_options(settings) | {"workers": 0})
    return predict(collate, examples, processes, how, batch_size)[0]


def judged(rows: list[dict], judge: Judge) -> list[dict]:
    """Adds to rows what the judge says of each; returns each data set's `score`."""
    judge_rows(rows, judge)
    return [score([row for row in rows if row["dataset"] == dataset], dataset)
            for dataset in dict.fromkeys(row["dataset"] for row in rows)]


def sample(collate: Collator, prompts: Prompts, places: list[int], step: int, settings: GRPOSettings) -> Completions:
    """G completions of each prompt of this process, --rollout-batch prompts at once; the noise of a completion is keyed
    by its prompt's place, so that tokens do not depend on that."""
    parts, G, N, eos = [], settings.group_size, settings.max_new_tokens, collate.tokenizer.eos_id
    size = settings.rollout_batch or len(places)
    for start in range(0, len(places), size):
        some = slice(start, start + size)
        noise = sampling_noise(settings.seed, step, places[some], G, N)
        parts.append(rollout(collate.model, prompts[some], G, N, eos, noise, settings.temperature, settings.top_k))
    return Completions.cat(parts, eos)
