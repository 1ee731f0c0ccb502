"""The pages of report.py and survey.py in a real browser, at two widths, in light and dark.

Needs Debian's chromium and chromium-driver and the extra [browser]; skipped without.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
from pages_material import key_of, run, studies, survey, truths, world  # noqa: F401


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update", "--disable-sync",
                     f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    made.get("about:blank")
    made.get_log("performance")  # what Chromium's own first page asked for
    yield made
    made.quit()


def look(browser, path: Path, width: int = 1280, scheme: str = "light") -> None:
    """Opens a page at a width in CSS pixels and in a colour scheme."""
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500})
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(path.as_uri())


def clean(browser) -> None:
    """No message in the console, and nothing asked of a network."""
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url.startswith(("file:", "data:", "blob:", "chrome:")) for url in asked), asked


def no_overflow(browser, width: int) -> None:
    """The page is no wider than the screen (not window.innerWidth: a phone's grows with what overflows)."""
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width, f"the page is {wide} px wide on a screen of {width}"


def playable(browser) -> bool:
    """Waits until the first clip has decoded its first frame."""
    browser.execute_script("window.v = document.querySelector('video'); v.muted = true; v.play()")
    for _ in range(100):
        if browser.execute_script("return v.readyState >= 2 && v.videoWidth > 0"):
            return True
        time.sleep(0.1)
    return False


def test_the_report_in_a_browser(browser, run, tmp_path):
    import report
    report.main([str(run), "--out", str(tmp_path / "report.html")])
    colours = {}
    for width in (1280, 375):
        for scheme in ("light", "dark"):
            look(browser, tmp_path / "report.html", width, scheme)
            no_overflow(browser, width)
            colours[scheme] = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
            shown = browser.find_element("css selector", "main").text
            assert "GRPO with R_E" in shown and "He cries." in shown and "sadness, anxiety" in shown
            assert "<script>document.title" in shown and "ours" in browser.title  # the completion's script is text
    assert colours == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 23, 26)"}
    loaded = "return [...document.images].every((i) => i.complete && i.naturalWidth > 0) && document.images.length"
    assert browser.execute_script(loaded) >= 4
    lines_drawn = browser.execute_script("return document.querySelectorAll('.panels svg path').length")
    assert lines_drawn > 20 and playable(browser)
    clean(browser)


def press(browser, css: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", css)


@pytest.mark.parametrize("kind,width", [("inside", 1280), ("beside", 375)])
def test_a_rater_answers_reloads_and_exports(browser, studies, tmp_path, kind, width):
    path, key = key_of(studies[kind])
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    look(browser, studies[kind] / "survey.html", width, "dark" if kind == "beside" else "light")
    no_overflow(browser, width)
    browser.find_element("id", "rater").send_keys("Anna B.")
    press(browser, "#who button")
    for number, (item, entry) in enumerate(key["items"].items()):
        assert not browser.find_element("id", "next").is_enabled() and not browser.find_elements("tag name", "video")
        press(browser, f"#{item}-emotion input[value='{entry['judged'][entry['emotion_of']]}']")
        press(browser, "#next")
        if number == 0:
            assert "</script> & <b>voice</b>" in browser.find_element("css selector", "blockquote").text
            assert playable(browser)
        for side in ("left", "right"):
            press(browser, f"#{item}-{side} input[value='{5 if entry[side] == 'Ours' else 2}']")
        no_overflow(browser, width)
        if number == 1:  # the answers, the rater and the place survive
            browser.refresh()
            assert browser.find_element("css selector", f"#{item}-left input:checked").get_attribute("value") in "52"
            assert "6 of 12 questions answered" in browser.find_element("id", "count").text
        press(browser, "#next")
    assert "All questions are answered." in browser.find_element("id", "left").text
    press(browser, "#export")
    for _ in range(100):
        if files := list(tmp_path.glob("survey-*.json")):
            break
        time.sleep(0.1)
    exported = json.loads(files[0].read_text())
    assert exported["rater"] == "Anna B." and exported["complete"] is True and exported["survey"] == key["survey"]
    result = survey.score(str(path), [str(files[0])])
    assert result["problems"] == [] and result["Ours"]["win rate"] == 100 and result["Theirs"]["mean"] == 2
    assert result["agreement"]["both"]["top 1"] == 100
    clean(browser)
