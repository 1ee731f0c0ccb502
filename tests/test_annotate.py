"""annotate.py: no equation without a section, no section of what is gone, no number that a function does not return."""

import html
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts" / "tools"), str(ROOT / "tests")]
import annotate  # noqa: E402
import annotate_numbers  # noqa: E402
from annotate_numbers import EXAMPLE, NUMBERS, TEXT, read_group  # noqa: E402
from test_pages import browser, clean, look, no_overflow  # noqa: E402, F401

from erv_min import erv, generate, grpo, metrics, rewards, sft  # noqa: E402
from erv_min.emotions import ERV_LABELS  # noqa: E402
from erv_min.metrics import COLUMNS  # noqa: E402
from erv_min.rewards import RewardSettings  # noqa: E402
from erv_min.run.errors import DataError  # noqa: E402

OF_THE_PAPER = [*(f"Eq. {n}" for n in range(1, 6)), "Algorithm 1", *COLUMNS]


@pytest.fixture(scope="module")
def group():
    return read_group("")


@pytest.fixture(scope="module")
def page(group):
    return annotate.build(group)


def missing(page: str) -> list[str]:
    """What of the paper has no section with an equation or listing, a symbol, a function, a test and numbers."""
    parts = re.findall(r'<section id="[^"]+" data-paper="([^"]+)">(.*?)</section>', page, re.S)
    told = [name for names, body in parts for name in ([names] if names[-1].isdigit() else names.split())
            if all(x in body for x in ("<math", 'class="code"', 'class="test"', 'class="numbers', "name in the code"))]
    return [name for name in OF_THE_PAPER if name not in told]


def test_every_equation_algorithm_and_metric_of_the_paper_has_its_section(page):
    assert missing(page) == []
    for name in ("Eq. 3", "Algorithm 1"):  # and the check sees one that is taken away
        assert missing(page.replace(f'data-paper="{name}"', "")) == [name]
    assert missing(page.replace('class="numbers', "")) == OF_THE_PAPER


def test_every_comment_is_replaced_and_ids_and_links_fit(page):
    assert "<!--" not in page and "{{" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert not re.search(r'(?:src|href)="(?!#|data:)', page) and "<script" not in page and "@import" not in page


def test_equations_are_mathml(page):
    def of(equation: str) -> str:
        return annotate.TOKEN.sub(annotate.mathml, f"<math>{equation}</math>")
    assert of("R_{i,E} &lt; 10") == (
        "<math><msub><mi>R</mi><mrow><mi>i</mi><mo>,</mo><mi>E</mi></mrow></msub> <mo>&lt;</mo> <mn>10</mn></math>")
    assert of("<mtext>if x</mtext> <mfrac>1 Cat_k</mfrac>") == (
        "<math><mtext>if x</mtext> <mfrac><mn>1</mn> <msub><mi>Cat</mi><mrow><mi>k</mi></mrow></msub></mfrac></math>")
    for equation in re.findall(r"<math.*?</math>", page, re.S):  # nothing is left bare
        assert not re.sub(r"<(m[ino]|mtext)\b.*?</\1>|<[^>]+>|\s", "", equation, flags=re.S)


@pytest.mark.parametrize("was,becomes,message", [
    ("code erv_min/grpo.py kl_k3", "code erv_min/grpo.py kl_k4", "kl_k4 of erv_min/grpo.py, which is not there"),
    ("code erv_min/grpo.py kl_k3", "code erv_min/gone.py kl_k3", "kl_k3 of erv_min/gone.py"),
    ("call erv_min/sft.py sft_loss", "call erv_min/sft.py sft_lost", "sft_lost of erv_min/sft.py"),
    ("test test_eq4-->", "test test_eq4_of_old-->", "test_eq4_of_old, which 0 files"),
    ("numbers kl-->", "numbers kl2-->", "numbers kl2"),
    ("numbers eq4 c N ", "numbers eq4 c M ", "column M, which the numbers do not have"),
    ("| N_neu | int", "| N_neutral | int", "N_neutral for a symbol"),
    ("divergence 7 21", "divergence 7 99", "divergence 99"),
])
def test_a_section_that_names_what_is_gone_is_an_error(group, was, becomes, message):
    (section,) = (x for x in re.findall(r"<section.*?</section>", TEXT, re.S) if was in x)
    with pytest.raises(DataError, match=re.escape(message)):
        annotate.Page(group, section.replace(was, becomes))


def test_source_is_the_files_and_margins_say_who_opens_whom(page):
    for path, name in (("erv_min/rewards.py", "explanation_reward"), ("erv_min/fsdp.py", "Sharded._attached")):
        head = rf'id="\w+\.{re.escape(name)}">.*?lines (\d+) to (\d+)<'
        block = re.search(rf"{head}.*?<pre[^>]*><span>.*?</span>(.*?)</pre>", page, re.S)
        shown = html.unescape(re.sub(r"<[^>]+>", "", block[3])).split("\n")
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(block[1]) - 1 : int(block[2])]
        assert [line.strip() for line in shown] == [line.strip() for line in lines]
        assert any(f"def {name.split('.')[-1]}(" in line for line in lines)
    margins = {name: re.findall(r'#([\w.]+)"', aside) for name, aside in
               re.findall(r'class="code" id="([\w.]+)"><h3>.*?<aside>(.*?)</aside>', page, re.S)}
    for opener, opened in (("grpo.main", "grpo.sample"), ("grpo.sample", "generate.rollout"),
                           ("rewards.score_completions", "rewards.explanation_reward"),
                           ("grpo.descend", "grpo.grpo_loss"), ("grpo.grpo_loss", "grpo.kl_k3"),
                           ("generate.prefill", "qwen2.Qwen2.forward"), ("logps.token_logps", "logps.TokenLogps")):
        assert opened in margins[opener] and opener in margins[opened]
    assert "metrics.score" not in margins["grpo.main"] and margins["sft.sft_loss"] == []


def close(seen: str, value) -> bool:
    """Whether what a reader sees is the value, rounded; runs are written `x (n times)`."""
    read = []
    for part in seen.replace("−", "-").split(", "):
        number, _, times = part.partition(" (")
        read += [float(number)] * int(times.removesuffix(" times)") or 1)
    return read == pytest.approx(torch.tensor(value, dtype=torch.float64).flatten().tolist(), abs=5.01e-4)


def test_what_is_seen_is_the_value_rounded_and_the_rows_are_the_functions(page, group):
    cells = re.findall(r'<data value="([^"]*)">([^<]*)</data>', page)
    assert len(cells) > 150 and all(close(html.unescape(seen), json.loads(value)) for value, seen in cells)
    for name, *columns in (x.split() for x in re.findall(r"<!--numbers ([^\n]*?)-->", TEXT)):
        assert annotate.chosen(NUMBERS[name](group), columns) in page


def test_algorithm_1_and_eq_4_by_hand(group):
    rows = NUMBERS["algorithm1"](group)
    assert [(x["EL_k"], x["over tau"], x["c"], x["N_neu"]) for x in rows.values()] == [
        ("neutral", 1, 0, 1), ("neutral, sadness", 2, 1, 0), ("sadness, anxiety", 2, 1, 0), ("surprise", 0, 0, 0),
        ("happiness", 1, 0, 0), ("sadness", 1, 1, 0)]
    for settings, c, N, N_neu, R_E in (
            ({}, 3, 6, 1, 3 / 5), ({"neutral_rule": "any"}, 3, 6, 2, 3 / 4), ({"tau": 0.1}, 4, 6, 1, 4 / 5),
            ({"neutral_filter": False}, 3, 6, 1, 3 / 6), ({"sentence_level": False}, 1, 1, 0, 1)):
        seen = NUMBERS["eq4"](group, **settings)
        assert (seen["c"], seen["N"], seen["N_neu"], seen["returned"]) == (c, N, N_neu, R_E)
        assert group.rewards(RewardSettings(**settings))[0].explanation == R_E


def test_eq_5_and_the_advantages(group):
    expected = rewards.score_completions(EXAMPLE["completions"], ["sad"] * 4, "dfew", group.verifier.probabilities,
                                         ERV_LABELS)
    assert list(NUMBERS["eq5"](group).values()) == [vars(r) for r in expected]
    (seen,) = NUMBERS["advantages"](group).values()
    assert seen["rewards"].equal(torch.tensor([r.total for r in expected])) and len(set(seen["rewards"].tolist())) == 4
    assert seen["returned"].equal(grpo.group_advantages(seen["rewards"], 4))
    torch.testing.assert_close(seen["returned"], (seen["rewards"] - seen["mean"]) / (seen["std"] + 1e-4))


def test_clip_and_kl(group):
    for key, row in NUMBERS["clip"](group).items():
        A, held = float(key[2:4]), key.endswith("held")
        for ratio, y in zip(row["ratio"].tolist(), row["surrogate"].tolist()):
            assert y == pytest.approx(min(ratio * A, min(max(ratio, 0.8), 1.2) * A), abs=1e-6)
            assert held == (ratio > 1.2 if A > 0 else ratio < 0.8) or min(abs(ratio - 0.8), abs(ratio - 1.2)) < 1e-6
    exact, other, k1, k2, k3 = NUMBERS["kl"](group).values()
    torch.testing.assert_close(k3["mean"], exact["mean"])
    torch.testing.assert_close(k3["gradient"], other["gradient"])
    torch.testing.assert_close(k2["gradient"], exact["gradient"])
    torch.testing.assert_close(k1["gradient"], torch.zeros(4, dtype=torch.float64))
    assert not torch.isclose(k2["mean"], exact["mean"], rtol=1e-3)


def test_splice_bytes_of_a_unit_and_metrics(group):
    (seen,) = NUMBERS["splice"](group).values()
    assert seen["places"].tolist() == [[5, *[-201] * 8, 6, *[-202] * 5, 7, 8]]
    rows = list(NUMBERS["fsdp"](group).values())  # before, during, after the forward pass; after the backward pass
    n = rows[0]["shard"] // 4
    assert [list(row.values()) for row in rows] == [[4 * n, 0, 0], [4 * n, 2 * n, 0], [4 * n, 0, 0], [4 * n, 0, 4 * n]]
    by_hand = {"EEA": 60, "FCR": 20, "EPC": 40, "WAR": 40}  # of five clips
    assert {x: NUMBERS["five_metrics"](group)["rule paper"][x] for x in by_hand} == pytest.approx(by_hand)


@pytest.mark.parametrize("module,name,section", [
    (rewards, "explanation_reward", "algorithm1"), (rewards, "select_labels", "algorithm1"),
    (rewards, "score_completions", "eq5"), (grpo, "group_advantages", "eq3"), (grpo, "kl_k3", "eq3"),
    (grpo, "grpo_loss", "eq3"), (sft, "sft_loss", "eq2"), (erv, "erv_loss", "verifier"),
    (generate, "sample_token", "sampling"), (metrics, "score", "metrics")])
def test_another_function_gives_another_page(monkeypatch, group, module, name, section):
    """No number is written by hand: where a function returns something else, the page shows that, or is not made."""
    text = re.search(rf'<section id="{section}".*?</section>', TEXT, re.S)[0]
    before = annotate.Page(group, text).html
    monkeypatch.setattr(module, name, lambda first=9, *_, **__: first * 2)
    try:
        assert annotate.Page(group, text).html != before
    except (AttributeError, DataError, KeyError, RuntimeError, TypeError):
        pass


def test_the_command_writes_the_page_in_seconds(tmp_path, capsys):
    started = time.process_time()
    annotate.main(["--out", str(tmp_path / "annotated.html")])
    assert "small examples" in capsys.readouterr().out and time.process_time() - started < 60
    assert (tmp_path / "annotated.html").stat().st_size < 2e6


def test_a_runs_own_completions(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="completions.jsonl"):
        read_group(str(tmp_path))
    said = ("<think>A room. He cries.</think>\n<answer>sad</answer>", "<think>Well.</think>\n<answer>happy</answer>")
    rows = [{"step": 3, "video_id": "v <1>", "ground_truth": "sad", "completion": o, "labels": EL,
             "reward_explanation": r} for o, EL, r in ((said[1], [["happiness"]], 0.0),
                                                       (said[0], [["neutral"], ["anger"]], 0.5))]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="no erv/"):
        read_group(str(tmp_path))
    (tmp_path / "erv").mkdir()
    monkeypatch.setitem(EXAMPLE, "probabilities", {"A room.": {"neutral": 0.9}, "He cries.": {"sadness": 0.9}})
    monkeypatch.setattr(erv.Verifier, "load", lambda folder: annotate_numbers.SmallVerifier())
    group = read_group(str(tmp_path))
    assert group.completions == list(said) and group.e_gt == "sad" and group.dataset == "dfew"
    assert [NUMBERS["eq4"](group)[x] for x in ("c", "N", "N_neu", "returned")] == [1, 2, 1, 1.0]
    assert "v &lt;1&gt;" in annotate.build(group, "<section></section>")


def test_the_page_in_a_browser(browser, page, tmp_path):  # noqa: F811
    (tmp_path / "annotated.html").write_text(page, encoding="utf-8")
    browser.get("about:blank")
    browser.get_log("performance")  # what Chromium's own first page asked for
    for width, scheme in ((1280, "light"), (375, "dark")):
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
