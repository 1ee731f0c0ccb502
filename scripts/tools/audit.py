"""What does the reward pay for? Ways to cheat R_E, and the verifier's agreement with a judge:

  python scripts/tools/audit.py --erv DIR --data toy:/world --judge lexicon

The paper reports none of this for its ERV. `cheat` writes completions that could earn R_E dishonestly, and `audit` pays
them.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace

import erv_min.toy.judges  # noqa: F401  registers them: lexicon, paraphrases
from erv_min.base.errors import DataError, SettingsError
from erv_min.base.files import write_json
from erv_min.base.options import option, parse
from erv_min.base.processes import run_script
from erv_min.base.progress import Progress
from erv_min.data.comparisons import agreement
from erv_min.data.examples import load_examples
from erv_min.data.pairs import targets
from erv_min.data.quality import verifier_report
from erv_min.data.results import read_predictions
from erv_min.emotions import ERV_LABELS, labels as dataset_labels, to_erv
from erv_min.erv import Verifier, erv_columns
from erv_min.judge import make_judge
from erv_min.prompts import QUESTION, sft_target
from erv_min.rewards import RewardSettings, extract_explanation, score_completions, select_labels, split_sentences
from erv_min.toy.lexicon import PARAPHRASES, sentences
from erv_min.train.log import explanation_statistics


def best_label(verifier: Verifier, sentences: list[str], labels: tuple[str, ...]) -> list[str]:
    """The verifier's best emotion of each sentence among `labels` (a data set's names: what a judge can answer)."""
    columns = dict(zip(ERV_LABELS, erv_columns(verifier.labels)))
    probs = verifier.probabilities(sentences)[:, [columns[to_erv(x)] for x in labels]]  # [S, len(labels)]
    return [labels[i] for i in probs.argmax(1).tolist()]


# ---- what the reward pays for ways to cheat --------------------------------------------------------------------------

CHEATS = ("repeat one sentence", "stuff label words", "drop neutral sentences", "one sentence only",
          "name the emotion in each", "two emotions in each", "claim calm around one", "copy the question",
          "another language", "wrong answer")
SPANISH = dict(zip(ERV_LABELS, ("enojo", "asco", "miedo", "felicidad", "calma", "tristeza", "sorpresa", "desprecio",
                                "ansiedad", "impotencia", "decepción")))


def cheat(way: str, sentences: list[str], e_gt: str, p_gt: list[float], neutral: list[bool]) -> list[str]:
    """An honest explanation's sentences, rewritten to earn R_E in one of CHEATS; it keeps the number where it can.

    p_gt: the verifier's probability of e_gt for each sentence; neutral: whether the reward leaves it out. A policy
    under R_E finds both by trying, so the cheat may use them. Raises SettingsError on another way."""
    best = sentences[max(range(len(sentences)), key=p_gt.__getitem__)]
    word, n = to_erv(e_gt), len(sentences)
    if way == "repeat one sentence":
        return [best] * n
    if way == "stuff label words":
        return [f"{word}, {word}, {word}.".capitalize()] * n
    if way == "drop neutral sentences":  # for a neutral e_gt they are the matches: nothing to gain
        return [s for s, out in zip(sentences, neutral) if not out or word == "neutral"] or [best]
    if way == "one sentence only":
        return [best]
    if way == "name the emotion in each":
        return [f"{s.rstrip('.!? ')}, which shows {word}." for s in sentences]
    if way == "two emotions in each":
        other = "fear" if word == "happiness" else "happiness"
        return [f"{s.rstrip('.!? ')}, which shows {word} or {other}." for s in sentences]
    if way == "claim calm around one":  # the filter leaves out what contradicts: found by a policy in the toy
        return ["The face is calm and neutral.", best, "The person is neutral."]
    if way == "copy the question":
        return split_sentences(QUESTION)
    if way == "another language":
        x = SPANISH[word]
        return [f"La persona del vídeo muestra {x}.", f"Su voz transmite {x}.", f"En conjunto, siente {x}."]
    if way == "wrong answer":
        return sentences
    raise SettingsError(f"way to cheat {way!r} is unknown; there are {', '.join(CHEATS)}")


RULES = {"paper": {}, "no neutral filter": {"ablate": "neutral-filtering"}}  # of RewardSettings; the second: table 2


@dataclass(frozen=True)
class AuditRow:
    """A way to cheat: what R_E pays (mean) under each of RULES, share judged as e_gt, and what the logs would show."""

    way: str
    rewards: dict[str, float]
    judged: float | None
    statistics: dict[str, float | None]


def audit(verifier: Verifier, explanations: list[str], e_gt: list[str], dataset: str, labels: tuple[str, ...],
          judge: Callable[[list[str]], list[str | None]] | None = None,
          settings: RewardSettings = RewardSettings()) -> list[AuditRow]:
    """Honest explanations and their e_gt -> a row per way to cheat, "honest" first; only the last has a wrong answer.

    labels: the data set's; judge: explanations -> emotions. Raises SettingsError where no sentence is found."""
    split = [split_sentences(text, settings.sentence_rule) for text in explanations]
    kept = [i for i, sentences in enumerate(split) if sentences]
    if not kept:
        raise SettingsError("the audit needs explanations with at least one sentence")
    column = dict(zip(ERV_LABELS, erv_columns(verifier.labels)))
    truths, ways = [e_gt[i] for i in kept], {way: [] for way in ("honest", *CHEATS)}
    for i in kept:
        probs = verifier.probabilities(split[i])  # [N_i, K]
        neutral = [EL == ["neutral"] for EL in select_labels(probs, verifier.labels, settings.tau, settings.k)]
        p_gt = probs[:, column[to_erv(e_gt[i])]].tolist()
        for way, texts in ways.items():
            sentences = split[i] if way == "honest" else cheat(way, split[i], e_gt[i], p_gt, neutral)
            answer = next(x for x in labels if x != e_gt[i]) if way == "wrong answer" else e_gt[i]
            texts.append(sft_target(" ".join(sentences), answer))
    rows = []
    for way, texts in ways.items():
        means = {}
        for name, changes in RULES.items():
            rules = replace(settings, **changes)
            scored = score_completions(texts, truths, dataset, verifier.probabilities, verifier.labels, rules)
            statistics = explanation_statistics(scored)  # the same under each
            means[name] = sum(r.explanation for r in scored) / len(scored)
        said = judge([extract_explanation(text) for text in texts]) if judge else None
        judged = sum(j == e for j, e in zip(said, truths)) / len(said) if said else None
        rows.append(AuditRow(way, means, judged, statistics))
    return rows


def audit_table(rows: list[AuditRow]) -> str:
    """The rows as a Markdown table; R_E in percent, the judge's column is EEA on the same explanations."""
    def cell(x: float | None, scale: float = 1) -> str:
        return "-" if x is None else f"{x * scale:.1f}"

    names = list(rows[0].rewards)
    head = ["explanation", *(f"R_E, {x}" for x in names), "judge", "sentences", "neutral", "label words", "distinct",
            "words"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        s = row.statistics
        lines.append([row.way, *(cell(row.rewards[x], 100) for x in names), cell(row.judged, 100), cell(s["sentences"]),
                      *(cell(s[x], 100) for x in ("neutral_share", "label_word_rate", "distinct_sentence_rate")),
                      cell(s["explanation_words"])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- command line ----------------------------------------------------------------------------------------------------


@dataclass
class AuditSettings:
    erv: str = option("", "the verifier: a folder or a hub repository")
    data: str = option("", "explanations with labels: toy:/world, json:dfew:/file.json")
    predictions: str = option("", "or JSONL rows of video_id, output, ground_truth, dataset")
    judge: str = option("", "lexicon, openai:gpt-4.1-mini, erv:/folder, ...")
    limit: int = option(200, "explanations at most; 0: all", least=0)
    tau: float = option(0.5, "threshold of algorithm 1", least=0, most=1)
    k: int = option(2, "labels per sentence at most (algorithm 1)", least=1)
    out: str = option("", "JSON file of the result")
    device: str = option("cpu", "cpu, cuda, cuda:1")


def read_completions(args: AuditSettings) -> list[tuple[str, str, str]]:
    """(completion, e_gt, data set) from predictions or annotated explanations, of one data set. Raises SettingsError
    without any, DataError naming file and row."""
    if args.predictions:
        found = [(x["output"], x["ground_truth"], x["dataset"]) for x in read_predictions(args.predictions, [])[0]]
    elif args.data:
        found = [(sft_target(x.explanation, x.label), x.label, x.dataset)
                 for x in load_examples(args.data, "sft") if x.explanation]
    else:
        raise SettingsError("no explanations: give --predictions rows.jsonl or --data toy:/world")
    if not found:
        raise SettingsError(f"{args.predictions or args.data}: no explanation found")
    if len(names := sorted({dataset for *_, dataset in found})) > 1:
        raise DataError(f"{args.predictions or args.data}: clips of {' and '.join(names)}; give one data set at a "
                        "time, since each has its own labels")
    return found


def on_paraphrases(verifier: Verifier, tau: float, k: int) -> dict:
    """The embedded world's verifier on sentences of other words than its training's (lexicon.PARAPHRASES)."""
    pairs = [(text, to_erv(emotion)) for emotion, texts in PARAPHRASES.items() if emotion for text in sentences(texts)]
    texts, truth = zip(*pairs)
    probs = verifier.probabilities(list(texts))[:, erv_columns(verifier.labels)]
    return verifier_report(probs, targets([[name] for name in truth]).bool(), tau, k)["unseen"]


def main(argv: list[str] | None = None) -> None:
    """Pays each way to cheat; honest are the explanations that the judge (where given) reads as their label."""
    args = parse(AuditSettings, __doc__, argv)
    if not args.erv:
        raise SettingsError("--erv: name a verifier, a folder or a hub repository")
    found, verifier = read_completions(args), Verifier.load(args.erv, args.device)
    dataset = found[0][2]
    names, judge = dataset_labels(dataset), make_judge(args.judge) if args.judge else None
    found = [(extract_explanation(c), e) for c, e, _ in found]
    found = found[:args.limit * (4 if judge else 1) or None]

    def ask(texts: list[str]) -> list[str | None]:
        return [x.emotion if x.status == "ok" else None for x in judge(texts, names)]

    result = {"erv": args.erv, "dataset": dataset, "judge": args.judge, "tau": args.tau, "k": args.k}
    if judge:
        sentences = list(dict.fromkeys(s for text, _ in found for s in split_sentences(text)))
        with Progress("verifier and judge read the sentences"):
            result["agreement"] = agreement(best_label(verifier, sentences, names), ask(sentences))
        honest = [x for x, emotion in zip(found, ask([text for text, _ in found])) if emotion == x[1]]
        print(f"{len(honest)} of {len(found)} explanations are honest: {args.judge} reads their label in them")
        found = honest[:args.limit or None]
    with Progress("each way to cheat is paid"):
        rows = audit(verifier, [text for text, _ in found], [e for _, e in found], dataset, names,
                     ask if judge else None, RewardSettings(tau=args.tau, k=args.k))
    result |= {"explanations": len(found), "rows": [dataclasses.asdict(row) for row in rows]}
    print(audit_table(rows))
    if judge:
        x = result["agreement"]
        kappa = "undefined" if x["kappa"] is None else f"{x['kappa']:.3f}"
        print(f"verifier and judge agree on {x['accuracy']:.1%} of {x['n']} different sentences, kappa {kappa} "
              f"({x['left_out']} without an answer)")
    if args.data.startswith("toy:"):
        result["paraphrases"] = on_paraphrases(verifier, args.tau, args.k)
        print("verifier on {sentences} paraphrases, none in training: macro F1 {macro_f1:.3f}".format(
            **result["paraphrases"]))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    run_script(main)
