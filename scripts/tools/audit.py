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
from erv_min.data.examples import load_examples
from erv_min.data.pairs import verifier_report
from erv_min.data.results import read_predictions
from erv_min.emotions import ERV_LABELS, labels as dataset_labels, to_erv
from erv_min.erv import Verifier, erv_columns
from erv_min.judge import erv_judge, make_judge
from erv_min.metrics import agreement
from erv_min.prompts import QUESTION, sft_target
from erv_min.rewards import RewardSettings, extract_explanation, score_completions, select_labels, split_sentences
from erv_min.toy.lexicon import PARAPHRASES
from erv_min.train.log import explanation_statistics


# ---- what the reward pays for ways to cheat --------------------------------------------------------------------------

SPANISH = dict(zip(ERV_LABELS, ("enojo", "asco", "miedo", "felicidad", "calma", "tristeza", "sorpresa", "desprecio",
                                "ansiedad", "impotencia", "decepción")))


def ways_to_cheat(sentences: list[str], e_gt: str, p_gt: list[float], neutral: list[bool]) -> dict[str, list[str]]:
    """Way -> an honest explanation's sentences, rewritten to earn R_E by it; the number is kept where it can be.

    p_gt: the verifier's probability of e_gt for each sentence; neutral: whether the reward leaves it out. A policy
    under R_E finds both by trying, so a cheat may use them."""
    best = sentences[max(range(len(sentences)), key=p_gt.__getitem__)]
    word, bare = to_erv(e_gt), [s.rstrip(".!? ") for s in sentences]
    other, said = "fear" if word == "happiness" else "happiness", SPANISH[word]
    return {
        "honest": sentences,
        "repeat one sentence": [best] * len(sentences),
        "stuff label words": [f"{word}, {word}, {word}.".capitalize()] * len(sentences),
        # for a neutral e_gt they are the matches: nothing to gain
        "drop neutral sentences": [s for s, out in zip(sentences, neutral) if not out or word == "neutral"] or [best],
        "one sentence only": [best],
        "name the emotion in each": [f"{s}, which shows {word}." for s in bare],
        "two emotions in each": [f"{s}, which shows {word} or {other}." for s in bare],
        # the filter leaves out what contradicts: found by a policy in the toy
        "claim calm around one": ["The face is calm and neutral.", best, "The person is neutral."],
        "copy the question": split_sentences(QUESTION),
        "another language": [f"La persona del vídeo muestra {said}.", f"Su voz transmite {said}.",
                             f"En conjunto, siente {said}."],
        "wrong answer": sentences}


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
    column = erv_columns(verifier.labels)
    truths, ways = [], {}  # way -> completions
    for text, truth in zip(explanations, e_gt):
        if not (split := split_sentences(text, settings.sentence_rule)):
            continue
        truths.append(truth)
        probs = verifier.probabilities(split)  # [N_i, K]
        neutral = [EL == ["neutral"] for EL in select_labels(probs, verifier.labels, settings.tau, settings.k)]
        p_gt = probs[:, column[to_erv(truth)]].tolist()
        for way, sentences in ways_to_cheat(split, truth, p_gt, neutral).items():
            answer = next(x for x in labels if x != truth) if way == "wrong answer" else truth
            ways.setdefault(way, []).append(sft_target(" ".join(sentences), answer))
    if not truths:
        raise SettingsError("the audit needs explanations with at least one sentence")
    rows = []
    for way, texts in ways.items():
        means = {}
        for name, changes in RULES.items():
            rules = replace(settings, **changes)
            scored = score_completions(texts, truths, dataset, verifier.probabilities, verifier.labels, rules)
            means[name] = sum(r.explanation for r in scored) / len(scored)
        said = judge([extract_explanation(text) for text in texts]) if judge else None
        judged = sum(j == e for j, e in zip(said, truths)) / len(said) if said else None
        rows.append(AuditRow(way, means, judged, explanation_statistics(scored)))  # the same under each rule
    return rows


def audit_table(rows: list[AuditRow]) -> str:
    """The rows as a Markdown table; R_E in percent, the judge's column is EEA on the same explanations."""
    def percent(x: float | None) -> str:
        return "-" if x is None else f"{100 * x:.1f}"

    lines = [["explanation", *(f"R_E, {rule}" for rule in RULES), "judge", "sentences", "neutral", "label words",
              "distinct", "words"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        s = row.statistics
        shares = [percent(s[x]) for x in ("neutral_share", "label_word_rate", "distinct_sentence_rate")]
        lines.append([row.way, *map(percent, row.rewards.values()), percent(row.judged), f"{s['sentences']:.1f}",
                      *shares, f"{s['explanation_words']:.1f}"])
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


def read_explanations(args: AuditSettings) -> tuple[list[tuple[str, str]], str]:
    """[(explanation, e_gt)] of predictions or annotated clips, and their one data set. Raises DataError."""
    if args.predictions:
        found = [(extract_explanation(x["output"]), x["ground_truth"], x["dataset"])
                 for x in read_predictions(args.predictions, [])[0]]
    else:
        found = [(x.explanation, x.label, x.dataset) for x in load_examples(args.data, "sft") if x.explanation]
    names = sorted({dataset for *_, dataset in found})
    if len(names) != 1:
        raise DataError(f"{args.predictions or args.data}: explanations of {' and '.join(names) or 'none'}: give one "
                        "data set at a time: each has its own labels")
    return [(explanation, e_gt) for explanation, e_gt, _ in found], names[0]


def on_paraphrases(verifier: Verifier, tau: float, k: int) -> dict:
    """The embedded world's verifier on sentences of other words than its training's (lexicon.PARAPHRASES)."""
    pairs = [(text, to_erv(emotion)) for emotion, texts in PARAPHRASES.items() if emotion != "looks" for text in texts]
    texts, truth = zip(*pairs)
    probs = verifier.probabilities(list(texts))[:, list(erv_columns(verifier.labels).values())]
    report = verifier_report(probs, [(name,) for name in truth], tau, k)
    return {"sentences": report["sentences"], "macro_f1": report["at_tau"]["macro_f1"]}


def main(argv: list[str] | None = None) -> None:
    args = parse(AuditSettings, __doc__, argv)
    if not args.erv:
        raise SettingsError("--erv: name a verifier, a folder or a hub repository")
    (found, dataset), verifier = read_explanations(args), Verifier.load(args.erv, args.device)
    names, judge = dataset_labels(dataset), make_judge(args.judge) if args.judge else None
    found = found[:args.limit * (4 if judge else 1) or None]

    def ask(texts: list[str]) -> list[str | None]:
        return [x.emotion for x in judge(texts, names)]

    result = {"erv": args.erv, "dataset": dataset, "judge": args.judge, "tau": args.tau, "k": args.k}
    if judge:
        sentences = list(dict.fromkeys(s for text, _ in found for s in split_sentences(text)))
        with Progress("verifier and judge read the sentences"):
            read = [x.emotion for x in erv_judge(verifier)(sentences, names)]
            result["agreement"] = agreement(read, ask(sentences))
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
