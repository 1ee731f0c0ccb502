"""annotate.py: no equation without a section, no section of what is gone, no number that a function does not return."""

import html
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts" / "tools"), str(ROOT / "tests")]
import annotate  # noqa: E402
from annotate import SECTIONS, SMALL, read_examples, seen_in  # noqa: E402
from test_pages import browser, clean, look, no_overflow  # noqa: E402, F401

from erv_min import erv, generate, grpo, metrics, rewards, sft  # noqa: E402
from erv_min.emotions import ERV_LABELS  # noqa: E402
from erv_min.metrics import COLUMNS  # noqa: E402
from erv_min.base.errors import CheckpointError, DataError  # noqa: E402

OF_THE_PAPER = [*(f"Eq. {n}" for n in range(1, 6)), "Algorithm 1", *COLUMNS]


@pytest.fixture(scope="module")
def examples():
    return read_examples("")


@pytest.fixture(scope="module")
def page(examples):
    return annotate.build(examples)


def missing(page: str) -> list[str]:
    """What of the paper has no section with an equation or listing, a symbol, a function, a test and numbers."""
    parts = re.findall(r'<section id="[^"]+" data-paper="([^"]+)">(.*?)</section>', page, re.S)
    told = [name for names, body in parts for name in ([names] if names[-1].isdigit() else names.split())
            if ("<math" in body or 'class="algorithm"' in body)
            and all(x in body for x in ('class="code"', 'class="test"', 'class="numbers', "name in the code"))]
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


def test_equations_are_mathml_and_symbols_stand_in_the_code_of_their_section():
    for equation in re.findall(r"<math.*?</math>", SECTIONS, re.S):  # nothing is left bare, every element is closed
        assert not re.sub(r"<[^>]+>|\s", "", re.sub(r"<(m[ino]|mtext)\b[^>]*>[^<]*</\1>", "", equation))
        assert ElementTree.fromstring(equation).tag == "math"
    for section in re.findall(r"<section.*?</section>", SECTIONS, re.S):
        code = "".join(annotate.source(key)[0] for key in re.findall(r"<!--code (\S+?)(?:-->| as)", section))
        for lines in re.findall(r"<!--symbols\n(.*?)\n-->", section, re.S):
            names = [line.split(" | ")[1] for line in lines.split("\n")]
            assert [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code)] == []


@pytest.mark.parametrize("was,becomes,message", [
    ("code erv_min.grpo:kl_k3", "code erv_min.grpo:kl_k4", "kl_k4 of erv_min/grpo.py, which is not there"),
    ("code erv_min.grpo:kl_k3", "code erv_min.gone:kl_k3", "erv_min/gone.py"),
    ("numbers erv_min.sft:sft_loss", "numbers erv_min.sft:sft_lost", "sft_lost"),
    (":test_eq4-->", ":test_eq4_of_old-->", "test_eq4_of_old of tests/equations/"),
    ("numbers kl-->", "numbers kl2-->", "kl2"),
    ("numbers eq4 c N ", "numbers eq4 c M ", "'M'"),
    ("README.md 7 21", "README.md 7 99", "'99'"),
    ("<!--symbols\nG |", "<!--symbol\nG |", "symbol"),
])
def test_a_section_that_names_what_is_gone_is_an_error(examples, was, becomes, message):
    (section,) = (x for x in re.findall(r"<section.*?</section>", SECTIONS, re.S) if was in x)
    with pytest.raises((DataError, OSError, AttributeError, KeyError), match=re.escape(message)):
        annotate.Page(examples, section.replace(was, becomes))


@pytest.mark.parametrize("rows, message", [("", "no completion in it"), ("3\n", "line 1: not a JSON object")])
def test_a_run_without_readable_completions_is_an_error(tmp_path, rows, message):
    (tmp_path / "erv").mkdir()
    (tmp_path / "completions.jsonl").write_text(rows)
    with pytest.raises(DataError, match=f"completions.jsonl.*{message}"):
        read_examples(str(tmp_path))


def test_source_is_the_files_and_margins_say_who_calls_whom(page):
    for path, name in (("erv_min/rewards.py", "explanation_reward"), ("erv_min/model/humanomni.py", "HumanOmni.splice")):
        head = rf'id="[\w.]+:{re.escape(name)}">.*?lines (\d+) to (\d+)<'
        block = re.search(rf"{head}.*?<pre[^>]*><span>.*?</span>(.*?)</pre>", page, re.S)
        shown = html.unescape(re.sub(r"<[^>]+>", "", block[3])).split("\n")
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()[int(block[1]) - 1 : int(block[2])]
        assert [line.strip() for line in shown] == [line.strip() for line in lines]
        assert any(f"def {name.split('.')[-1]}(" in line for line in lines)
    margins = {name: re.findall(r'#([\w.:]+)"', aside) for name, aside in
               re.findall(r'class="code" id="([\w.:]+)"><h3>.*?<aside>(.*?)</aside>', page, re.S)}
    loop = annotate.functions_of("scripts.grpo")
    assert "scripts.grpo:main" in loop and {*loop} <= margins.keys()
    for caller, called in (("scripts.grpo:train", "erv_min.train.hooks:sample"),
                           ("erv_min.train.hooks:sample", "erv_min.generate:rollout"),
                           ("scripts.grpo:train", "erv_min.grpo:grpo_loss"),
                           ("erv_min.rewards:score_completions", "erv_min.rewards:explanation_reward"),
                           ("erv_min.grpo:grpo_loss", "erv_min.grpo:kl_k3"),
                           ("erv_min.generate:prefill", "erv_min.model.qwen2:Qwen2.forward"),
                           ("erv_min.logps:token_logps", "erv_min.base.chunked:TokenLogps")):
        assert called in margins[caller] and caller in margins[called]
    assert "erv_min.metrics:score" not in margins["scripts.grpo:main"] and margins["erv_min.sft:sft_loss"] == []
    assert "erv_min.generate:sampling_noise" not in margins["erv_min.generate:rollout"]  # it stands in a message alone


def test_what_is_seen_is_the_value_rounded(page):
    cells = re.findall(r'<data value="([^"]*)">([^<]*)</data>', page)
    assert len(cells) > 150
    for whole, seen in cells:
        seen, whole = (torch.tensor(json.loads(x), dtype=torch.float64) for x in (seen.replace("−", "-"), whole))
        torch.testing.assert_close(seen, whole, atol=5.01e-5, rtol=0)
    assert annotate.value(torch.tensor([-0.00001, 1 / 3])).endswith(">[0, 0.3333]</data>")
    assert annotate.value("`a` < b") == "<code>a</code> &lt; b" and annotate.value(torch.ones(4, 9)) == "float32 [4, 9]"


def test_the_rows_are_what_the_functions_return(page, examples):
    """Each row again, without the page: cell by cell what the function's variables or the method's columns are."""
    def cells(row, columns) -> str:
        return "".join(f"<td>{annotate.value(row[x])}</td>" for x in columns)
    losses = ({"logps": torch.tensor([[-1.0, -2.0], [-4.0, 9.0]]), "mask": torch.tensor([[1, 1], [1, 0]])}, 7 / 3)
    seen = {**losses[0], "denominator": torch.tensor(3), "returned": torch.tensor(losses[1])}
    assert cells(seen, seen) in page
    for name, *columns in (x.split() for x in re.findall(r"<!--numbers (\w[^\n:]*?)-->", SECTIONS)):
        for row in getattr(examples, name)().values():
            assert cells(row, columns or row) in page
    for settings in ({}, {"neutral_rule": "any"}, {"ablate": "neutral-filtering"}, {"ablate": "sentence-level"}, {"tau": 0.1}):
        assert cells(examples.eq4(**settings), ("c", "N", "N_neu", "denominator", "returned")) in page
    for rule in ("paper", "released"):
        assert cells(metrics.score(SMALL["clips"], "dfew", rule), COLUMNS) in page


def test_algorithm_1_and_eq_4_by_hand(examples):
    rows = examples.algorithm1()
    assert [(x["EL_k"], x["over tau"], x["c"], x["N_neu"]) for x in rows.values()] == [
        ("neutral", 1, 0, 1), ("neutral, sadness", 2, 1, 0), ("sadness, anxiety", 2, 1, 0), ("surprise", 0, 0, 0),
        ("happiness", 1, 0, 0), ("sadness", 1, 1, 0)]
    for settings, c, N, N_neu, R_E in (
            ({}, 3, 6, 1, 3 / 5), ({"neutral_rule": "any"}, 3, 6, 2, 3 / 4), ({"tau": 0.1}, 4, 6, 1, 4 / 5),
            ({"ablate": "neutral-filtering"}, 3, 6, 1, 3 / 6), ({"ablate": "sentence-level"}, 1, 1, 0, 1)):
        seen = examples.eq4(**settings)
        assert (seen["c"], seen["N"], seen["N_neu"], seen["returned"]) == (c, N, N_neu, R_E)
        assert examples.rewards(**settings)[0].explanation == R_E


def test_eq_5_and_the_advantages(examples):
    expected = rewards.score_completions(SMALL["completions"], ["sad"] * 4, "dfew", annotate.small_verifier, ERV_LABELS)
    assert list(examples.eq5().values()) == [vars(r) for r in expected]
    (seen,) = examples.advantages().values()
    assert seen["rewards"].equal(torch.tensor([r.total for r in expected])) and len(set(seen["rewards"].tolist())) == 4
    assert seen["returned"].equal(grpo.group_advantages(seen["rewards"], 4))
    torch.testing.assert_close(seen["returned"], (seen["rewards"] - seen["mean"]) / (seen["std"] + 1e-4))


def test_the_curves_and_where_they_are_dotted(page):
    curves = re.findall(r'<polyline (class="held" )?points="([^"]+)"', page)
    for A, (held, points) in zip((1, 1, -1, -1), curves, strict=True):
        for x, y in (map(float, point.split(",")) for point in points.split()):
            assert -y / 100 == pytest.approx(min(x / 100 * A, min(max(x / 100, 0.8), 1.2) * A), abs=2e-3)
        x = [float(point.split(",")[0]) / 100 for point in points.split()][1:-1]
        logps, zeros = torch.tensor(x).log()[:, None].requires_grad_(), torch.zeros(len(x), 1)
        grpo.grpo_loss(logps, zeros, zeros, A + zeros[:, 0], zeros == 0, beta=0.0).backward()
        assert (logps.grad == 0).all() if held else (logps.grad != 0).all()


def test_kl(examples):
    exact, other, k1, k2, k3 = examples.kl().values()
    torch.testing.assert_close(k3["mean"], exact["mean"])
    torch.testing.assert_close(k3["gradient"], other["gradient"])
    torch.testing.assert_close(k2["gradient"], exact["gradient"])
    torch.testing.assert_close(k1["gradient"], torch.zeros(4, dtype=torch.float64))
    assert not torch.isclose(k2["mean"], exact["mean"], rtol=1e-3)


def test_splice_and_metrics(examples):
    (seen,) = examples.splice().values()
    assert seen["expanded"].tolist() == [[5, *[-201] * 4, 6, *[-202] * 2, 7, 8]]
    by_hand = {"EEA": 60, "FCR": 20, "EPC": 40, "WAR": 40}  # of five clips
    assert {x: examples.five_metrics("paper")[x] for x in by_hand} == pytest.approx(by_hand)


def test_seen_in_takes_the_last_return_and_leaves_no_profile():
    def inner(x):
        y = 2 * x
        return y + 1
    assert seen_in(inner, lambda: [inner(1), inner(2)]) == {"x": 2, "y": 4, "returned": 5} == seen_in(inner, x=2)
    with pytest.raises(TypeError):
        seen_in(inner)
    assert sys.getprofile() is None


@pytest.mark.parametrize("module,name,section", [
    (rewards, "explanation_reward", "algorithm1"), (rewards, "select_labels", "algorithm1"),
    (rewards, "score_completions", "eq5"), (grpo, "group_advantages", "eq3"), (grpo, "kl_k3", "eq3"),
    (grpo, "grpo_loss", "eq3"), (sft, "sft_loss", "eq2"), (erv, "erv_loss", "verifier"),
    (generate, "sample_token", "sampling"), (metrics, "score", "metrics")])
def test_another_function_gives_another_page(monkeypatch, examples, module, name, section):
    """No number is written by hand: where a function returns something else, the page shows that, or is not made."""
    text = re.search(rf'<section id="{section}".*?</section>', SECTIONS, re.S)[0]
    before = annotate.Page(examples, text).html
    monkeypatch.setattr(module, name, lambda first=9, *_, **__: first * 2)
    try:
        assert annotate.Page(examples, text).html != before
    except (AttributeError, DataError, KeyError, RuntimeError, TypeError):
        pass


def test_the_command_writes_the_page_in_seconds(tmp_path, capsys):
    started = time.process_time()
    annotate.main(["--out", str(tmp_path / "annotated.html")])
    assert "small examples" in capsys.readouterr().out and time.process_time() - started < 60
    assert (tmp_path / "annotated.html").stat().st_size < 2e6


def test_a_runs_own_completions(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="completions.jsonl: no such file"):
        read_examples(str(tmp_path))
    said = ("<think>A room. He cries.</think>\n<answer>sad</answer>", "<think>Well.</think>\n<answer>happy</answer>")
    rows = [{"step": 3, "video_id": "v <1>", "dataset": "dfew", "ground_truth": "sad", "completion": o, "labels": EL,
             "sentences": [""] * len(EL), "reward_format": 1.0, "reward_answer": 0.0, "reward_explanation": r}
            for o, EL, r in ((said[1], [["happiness"]], 0.0), (said[0], [["neutral"], ["anger"]], 0.5))]
    (tmp_path / "completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CheckpointError, match="erv"):
        read_examples(str(tmp_path))
    (tmp_path / "erv").mkdir()
    monkeypatch.setitem(SMALL, "probabilities", {"A room.": {"neutral": 0.9}, "He cries.": {"sadness": 0.9}})
    verifier = SimpleNamespace(probabilities=annotate.small_verifier, labels=ERV_LABELS)
    monkeypatch.setattr(erv.Verifier, "load", lambda folder: verifier)
    examples = read_examples(str(tmp_path))
    assert examples.completions == list(said) and examples.e_gt == "sad"
    assert [examples.eq4()[x] for x in ("c", "N", "N_neu", "returned")] == [1, 2, 1, 1.0]
    assert "v &lt;1&gt;; the true emotion is sad" in annotate.build(examples, "<section></section>")


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
            "!e.closest('pre, .wide, .eq, .algorithm') && "
            "e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))")
        assert wider == []
    # MathML is laid out, not run together as text: a fraction's parts stand one above the other
    above, below = browser.execute_script(
        "return [...document.querySelector('#eq4 mfrac').children].map((x) => x.getBoundingClientRect().top)")
    assert above < below
    clean(browser)
