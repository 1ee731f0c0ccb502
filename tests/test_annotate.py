"""annotate.py: no equation without a section, no section of what is gone, no number that a function does not return."""

import html
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent
while not (ROOT / "scripts").is_dir():
    ROOT = ROOT.parent
sys.path[:0] = [str(ROOT / "scripts" / "tools"), str(Path(__file__).resolve().parent)]
import annotate  # noqa: E402
import annotate_numbers as numbers  # noqa: E402
from annotate_code import walk as made_walk  # noqa: E402
from test_pages import browser, clean, look, no_overflow  # noqa: E402, F401

from erv_min.emotions import ERV_LABELS  # noqa: E402
from erv_min.generate import sample_token, sampling_noise  # noqa: E402
from erv_min.grpo import group_advantages, kl_k3  # noqa: E402
from erv_min.metrics import COLUMNS, score  # noqa: E402
from erv_min.rewards import (RewardSettings, extract_explanation, score_completions, select_labels,  # noqa: E402
                             split_sentences)
from erv_min.run.errors import DataError  # noqa: E402
from erv_min.sft import sft_loss  # noqa: E402

OF_THE_PAPER = [*(f"Eq. {n}" for n in range(1, 6)), "Algorithm 1", *COLUMNS]


@pytest.fixture(scope="module")
def group():
    return numbers.read_group("")


@pytest.fixture(scope="module")
def page(group):
    return annotate.build(group)


def shown(page: str) -> dict:
    """name -> (value, the text that a reader sees) of every number; plots by their own attributes."""
    found = re.findall(r'<data data-name="([^"]+)" value="([^"]*)">([^<]*)</data>', page)
    assert len({name for name, *_ in found}) == len(found)
    plots = re.findall(r'data-name="([^"]+)" data-value="([^"]*)"', page)
    return {html.unescape(n): (json.loads(html.unescape(v)), seen) for n, v, seen in found} | {
        n: (json.loads(v), None) for n, v in plots}


# ---- the paper has its sections --------------------------------------------------------------------------------------


def without(sections: str, name: str) -> str:
    return re.sub(rf'data-paper="{re.escape(name)}"', "", sections)


def missing(page: str) -> list[str]:
    """What of the paper has no section with an equation or listing, a symbol, a function, a test and numbers."""
    parts = re.findall(r'<section id="[^"]+" data-paper="([^"]+)">(.*?)</section>', page, re.S)
    told = [name for names, body in parts for name in ([names] if names[-1].isdigit() else names.split())
            if all(x in body for x in ("<math", 'class="code"', 'class="test"', 'class="numbers"', "name in the code"))]
    return [name for name in OF_THE_PAPER if name not in told]


def test_every_equation_algorithm_and_metric_of_the_paper_has_its_section(page):
    assert missing(page) == []
    for name in ("Eq. 3", "Algorithm 1"):  # and the check sees one that is taken away
        assert missing(without(page, name)) == [name]
    assert missing(page.replace('class="numbers"', "")) == OF_THE_PAPER


def test_every_comment_is_replaced_and_ids_and_links_fit(page):
    assert "<!--" not in page[page.index("<section"):]
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert not re.search(r'(?:src|href)="(?!#|data:)', page) and "<script" not in page and "@import" not in page


def test_divergences_are_those_of_the_list():
    listed = ROOT / "erv_min" / "README.md"
    named = re.findall(r"<!--divergence ([\d ]+)-->", annotate.SECTIONS.read_text(encoding="utf-8"))
    named = [n for part in named for n in part.split()]
    assert len(named) == len(set(named)) and {"1", "2", "3", "6", "7", "8", "16", "21", "22"} <= set(named)
    if not listed.exists():
        pytest.skip("erv_min/README.md is not there")
    assert set(named) <= set(re.findall(r"^\| *(\d+) *\|", listed.read_text(encoding="utf-8"), re.M))


# ---- what is gone is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("was,becomes,message", [
    ("code erv_min/grpo.py kl_k3", "code erv_min/grpo.py kl_k4", "kl_k4 of erv_min/grpo.py, which is not there"),
    ("code erv_min/grpo.py kl_k3", "code erv_min/gone.py kl_k3", "kl_k3 of erv_min/gone.py"),
    ("test test_eq4-->", "test test_eq4_of_old-->", "test_eq4_of_old, which 0 files"),
    ("numbers kl-->", "numbers kl2-->", "numbers kl2"),
    ("| N_neu | int", "| N_neutral | int", "N_neutral for a symbol"),
])
def test_a_section_that_names_what_is_gone_is_an_error(group, was, becomes, message):
    sections = annotate.SECTIONS.read_text(encoding="utf-8")
    section = next(x for x in re.findall(r"<section.*?</section>", sections, re.S) if was in x)
    section = re.sub(r"<!--numbers \w+-->", "", section) if was.startswith("code") else section
    with pytest.raises(DataError, match=re.escape(message)):
        annotate.Page(section.replace(was, becomes), group).build()


def test_a_run_without_completions_or_verifier_is_named(tmp_path):
    with pytest.raises(DataError, match="completions.jsonl"):
        numbers.read_group(str(tmp_path))


def test_source_is_the_files(page):
    for path, name in (("erv_min/rewards.py", "explanation_reward"), ("erv_min/fsdp.py", "Sharded._attached")):
        block = re.search(rf'id="\w+\.{re.escape(name)}">.*?lines (\d+) to (\d+)<.*?<pre[^>]*>(.*?)</pre>', page, re.S)
        source = html.unescape(re.sub(r"<[^>]+>", "", block[3])).rstrip("\n").split("\n")
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(block[1]) - 1 : int(block[2])]
        assert [line.strip() for line in source] == [line.strip() for line in lines]
        assert any(f"def {name.split('.')[-1]}(" in line for line in lines)


def test_who_opens_whom_by_hand():
    walk = made_walk()
    key = {(p.name, name): (p, name) for p, name in walk.known}

    def opens(a, b):
        assert (key[b] in walk.opens[key[a]]) == (key[a] in walk.opened_by[key[b]])
        return key[b] in walk.opens[key[a]]
    assert opens(("rewards.py", "score_completions"), ("rewards.py", "explanation_reward"))
    assert opens(("grpo.py", "grpo_loss"), ("grpo.py", "kl_k3"))
    assert opens(("generate.py", "rollout"), ("generate.py", "prefill"))
    assert opens(("generate.py", "prefill"), ("qwen2.py", "Qwen2.forward"))  # model.model(...)
    assert opens(("humanomni.py", "HumanOmni.project_video"), ("projector.py", "VisualProjector.forward"))
    assert not opens(("humanomni.py", "HumanOmni.splice"), ("inputs.py", "Collator.text"))  # config.text
    assert key["rewards.py", "select_labels"] in walk.reached and key["sft.py", "sft_loss"] not in walk.reached


# ---- the numbers are what the functions return -----------------------------------------------------------------------


def test_what_is_seen_is_the_value_rounded(page):
    for name, (value, seen) in shown(page).items():
        if seen is not None:
            flat = torch.tensor(value, dtype=torch.float64).flatten().tolist()
            read = [float(x.replace(",", "").replace("−", "-")) for x in re.split("[,;] ", seen)]
            assert read == pytest.approx(flat, abs=5.01e-4), name


def test_numbers_of_algorithm_1_and_eq_4(page, group):
    values = {name: value for name, (value, _) in shown(page).items()}
    S = split_sentences(extract_explanation(group.completions[0]))
    u = group.probabilities(S)
    assert len(S) == 6
    for k, EL in enumerate(select_labels(u, ERV_LABELS)):
        on_page = {name.split(".")[2]: v for name, v in values.items() if name.startswith(f"EL.{k}.")}
        assert on_page.pop("over") == int((u[k] > 0.5).sum())
        assert on_page == pytest.approx({label: u[k, ERV_LABELS.index(label)].item() for label in EL})
    ways = {"default": RewardSettings(), "any": RewardSettings(neutral_rule="any"),
            "no_filter": RewardSettings(neutral_filter=False), "whole": RewardSettings(sentence_level=False),
            "released": RewardSettings.released()}
    for way, settings in ways.items():
        (reward,) = score_completions(group.completions[:1], ["sad"], "dfew", group.probabilities, ERV_LABELS, settings)
        assert values[f"eq4.{way}.R_E"] == reward.explanation
        assert values[f"eq4.{way}.N"] == len(reward.label_sets)
        assert values[f"eq4.{way}.c"] == sum("sadness" in EL for EL in reward.label_sets)
        assert values[f"eq4.{way}.c"] / values[f"eq4.{way}.denominator"] == reward.explanation
        rule = "neutral" if way == "any" else None
        assert values[f"eq4.{way}.N_neu"] == sum(rule in EL if rule else EL == ["neutral"] for EL in reward.label_sets)
    # worked by hand: {neutral}, {neutral, sadness}, {sadness, anxiety}, {surprise}, {happiness}, {sadness}
    assert [values[f"eq4.{way}.R_E"] for way in ("default", "any", "no_filter")] == [3 / 5, 3 / 4, 3 / 6]


def test_numbers_of_eq_5_and_the_advantages(page, group):
    values = {name: value for name, (value, _) in shown(page).items()}
    n = len(group.completions)
    rewards = score_completions(group.completions, ["sad"] * n, "dfew", group.probabilities, ERV_LABELS)
    for i, r in enumerate(rewards):
        assert [values[f"eq5.{i}.{x}"] for x in ("explanation", "format", "answer", "total")] == [
            r.explanation, r.format, r.answer, r.total]
    R = torch.tensor([r.total for r in rewards])
    assert values["A"] == group_advantages(R, n).tolist()
    assert values["A.mean"] == pytest.approx(sum(values["A.rewards"]) / n)
    spread = (sum((x - values["A.mean"]) ** 2 for x in values["A.rewards"]) / (n - 1)) ** 0.5
    assert values["A.std"] == pytest.approx(spread) and len(set(values["A.rewards"])) == n


def test_numbers_of_eq_2_and_eq_3(page):
    values = {name: value for name, (value, _) in shown(page).items()}
    logps, mask = torch.tensor(values["sft.logps"]), torch.tensor(values["sft.mask"])
    assert values["sft.mean"] == sft_loss(logps, mask).item() == pytest.approx(7 / 3)
    assert values["sft.sum"] == sft_loss(logps, mask, 2).item() == pytest.approx(7 / 2)
    for A in (1, -1):
        by_hand = [min(r * A, min(max(r, 0.8), 1.2) * A) for r in numbers.RATIOS]
        assert values[f"clip.{A:+d}"] == pytest.approx(by_hand, abs=1e-6)
    logits = torch.tensor(numbers.POLICY, dtype=torch.float64, requires_grad=True)
    ref, logp = torch.tensor(numbers.REFERENCE, dtype=torch.float64).log(), logits.log_softmax(0)
    k3 = (logp.detach().exp() * kl_k3(logp, ref)).sum()
    assert values["kl.k3"] == k3.item() == pytest.approx(values["kl.KL"])
    assert values["kl.k3.gradient"] == torch.autograd.grad(k3, logits)[0].tolist()
    assert values["kl.k3.gradient"] == pytest.approx(values["kl.reverse.gradient"])
    assert values["kl.k2.gradient"] == pytest.approx(values["kl.KL.gradient"])
    assert values["kl.k1.gradient"] == pytest.approx([0] * 4)
    assert values["kl.k2"] != pytest.approx(values["kl.KL"], rel=1e-3)


def test_numbers_of_sampling_log_probs_splice_and_metrics(page):
    values = {name: value for name, (value, _) in shown(page).items()}
    logits = torch.tensor(numbers.THREE).log().expand(len(numbers.NOISE), 3)
    for key, how in numbers.WAYS_TO_SAMPLE.items():
        tokens = sample_token(logits, torch.tensor(numbers.NOISE, dtype=torch.float64), *how).tolist()
        assert [values[f"sample.{key}.{i}"] for i in range(len(tokens))] == tokens
    beside, alone = "noise.prompt 4, beside prompt 3", "noise.prompt 4 alone"
    assert values[f"{beside}.1"] == values[f"{alone}.1"] == sampling_noise(0, 7, [4], 2, 3)[1].tolist()
    assert [values["token_logps.1"], values["token_logps.0.5"]] == pytest.approx([0.75, 0.9])
    assert values["logps.shared"] == 15 and values["logps.repeated"] == 33 and values["logps.difference"] < 1e-4
    assert sum(values["splice.gate"]) == pytest.approx(1)
    assert values["splice.X_m"][1] == values["splice.X_v"][1] + values["splice.X_a"][1] + 4  # four words of the prompt
    runs = [name for name in values if re.fullmatch(r"splice\.\d+", name)]  # in the order of the page
    assert [values[name] for name in runs] == [1, values["splice.X_v"][1], 1, values["splice.X_a"][1], 2]
    for rule in ("paper", "released"):
        scores = score(numbers.clip_rows(), "dfew", rule)
        assert [values[f"metrics.{rule}.{name}"] for name in COLUMNS] == [scores[name] for name in COLUMNS]
    by_hand = {"EEA": 60, "FCR": 20, "EPC": 40, "WAR": 40}  # of five clips
    assert {name: values[f"metrics.paper.{name}"] for name in by_hand} == pytest.approx(by_hand)


def test_bytes_of_a_unit(page):
    values = {name: value for name, (value, _) in shown(page).items() if name.startswith("fsdp")}
    n = values.pop("fsdp.numel")
    moments = ("before its forward pass", "during it", "after it", "after the backward pass")
    assert [values[f"fsdp.{m}.shard"] for m in moments] == [4 * n] * 4
    assert [values[f"fsdp.{m}.gathered"] for m in moments] == [0, 2 * n, 0, 0]
    assert [values[f"fsdp.{m}.gradient"] for m in moments] == [0, 0, 0, 4 * n]


@pytest.mark.parametrize("name,section,other", [
    ("explanation_reward", "algorithm1", lambda *_: 0), ("score_completions", "eq5", None),
    ("group_advantages", "advantages", lambda R, G: R * 7), ("kl_k3", "kl", lambda a, b: (a - b) * 3),
    ("sft_loss", "sft", lambda *_: torch.tensor(9.0)), ("sampling_noise", "sampling", lambda *_: torch.zeros(4, 3)),
    ("grpo_loss", "clip", None), ("completion_logps", "logps", lambda *_: (torch.zeros(3, 5), None)),
    ("token_logps", "logps", lambda *_: (torch.zeros(1), None)), ("erv_loss", "verifier", lambda *_: torch.tensor(9.0)),
    ("score", "metrics", lambda *_: dict.fromkeys(COLUMNS, 1.0)),
    ("select_labels", "algorithm1", lambda u, *_: [["fear"]] * len(u)),
])
def test_another_function_gives_another_page(monkeypatch, group, name, section, other):
    """No number is written by hand: where a function returns something else, the page shows that, or is not made."""
    make = getattr(numbers, f"numbers_{section}")
    before = make(group)
    monkeypatch.setattr(numbers, name, other)
    try:
        assert make(group) != before
    except (AttributeError, KeyError, TypeError):
        pass


def test_the_command_writes_the_page_in_seconds(tmp_path, capsys):
    started = time.time()
    annotate.main(["--out", str(tmp_path / "annotated.html")])
    assert "small examples" in capsys.readouterr().out and time.time() - started < 60
    assert (tmp_path / "annotated.html").stat().st_size < 2e6


def test_a_runs_own_completions(tmp_path, monkeypatch):
    (tmp_path / "erv").mkdir()
    said = ("<think>A room. He cries.</think>\n<answer>sad</answer>", "<think>Well.</think>\n<answer>happy</answer>")
    rows = [{"step": 3, "video_id": "v <1>", "ground_truth": "sad", "completion": o, "labels": EL,
             "reward_explanation": r} for o, EL, r in ((said[1], [["happiness"]], 0.0),
                                                       (said[0], [["neutral"], ["anger"], ["sadness"]], 0.5))]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Verifier:
        labels = ERV_LABELS

        def probabilities(self, sentences):
            return torch.tensor([[0.9 * (label == ("sadness" if "cries" in s else "neutral")) for label in ERV_LABELS]
                                 for s in sentences])
    monkeypatch.setattr(numbers.Verifier, "load", lambda folder: Verifier())
    group = numbers.read_group(str(tmp_path))
    assert group.completions == list(said) and group.e_gt == "sad" and group.dataset == "dfew"
    found = shown(numbers.numbers_eq4(group))
    assert found["eq4.default.R_E"][0] == 1 and found["eq4.default.N_neu"][0] == 1
    assert "v &lt;1&gt;" in numbers.numbers_algorithm1(group)


def test_the_page_in_a_browser(browser, page, tmp_path):  # noqa: F811
    (tmp_path / "annotated.html").write_text(page, encoding="utf-8")
    browser.get("about:blank")
    browser.get_log("performance")  # what Chromium's own first page asked for
    for width in (1280, 375):
        for scheme in ("light", "dark"):
            look(browser, tmp_path / "annotated.html", width, scheme)
            no_overflow(browser, width)
            sizes = browser.execute_script(
                "return [...document.querySelectorAll('.eq math')].map((m) => m.getBoundingClientRect().height)")
            assert len(sizes) >= 10 and min(sizes) > 12
            wider = browser.execute_script(  # outside of what scrolls by itself nothing is wider than the screen
                "return [...document.querySelectorAll('main *')].filter((e) => "
                "!e.closest('pre, .scroll, .eq, .algorithm') && "
                "e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))")
            assert wider == []
    # MathML is laid out, not run together as text: a fraction's parts stand one above the other
    above, below = browser.execute_script(
        "return [...document.querySelector('#eq4 mfrac').children].map((x) => x.getBoundingClientRect().top)")
    assert above < below
    clean(browser)
