"""report.html in a real headless Chromium: sections, filters, pairs, awkward runs, and texts that would like to act.

Not covered: other browsers, and how it looks, which was judged by eye at two sizes in both themes.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from megatron_mcpo.reporting.html.html_report import write_report
from tests.support.paths import ROOT
from tests.support.report_runs import NAMES, OFF, MadeRun, config_of, data_of, made_run, partners

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver (apt install chromium chromium-driver)"
)
SECTIONS = ["overview", "curves", "similarity", "map", "rollouts", "timings", "settings"]


class Page:
    """A report that is open in the browser."""

    def __init__(self, driver: webdriver.Chrome, path: Path):
        self.driver = driver
        driver.get("about:blank")  # a new address behind # alone would not load the page again
        driver.get(path.as_uri())
        self.data = data_of(path)
        self.wait(lambda: self.find("#main > section"))

    def wait(self, condition: Callable[[], Any]) -> Any:
        # The page may redraw between finding an element and reading it; then the condition is asked again.
        patient = WebDriverWait(self.driver, 80, ignored_exceptions=[StaleElementReferenceException])
        return patient.until(lambda _: condition())

    def find(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return "\n".join(element.text for element in self.find(selector))

    def go(self, section: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, f'nav a[href="#{section}"]').click()
        self.wait(lambda: self.find(f"#section-{section}"))

    def choose(self, name: str, value: str) -> None:
        Select(self.driver.find_element(By.NAME, name)).select_by_value(value)

    def open(self, step: int, place: int) -> None:
        self.driver.execute_script(f"location.hash = '#rollouts/{step}/{place}'")
        self.wait(lambda: self.find(".detail h3"))

    def place(self) -> list[int]:
        """Step and place of the rollout that is open."""
        address = self.driver.execute_script("return location.hash")
        return [int(part) for part in address.split("/")[1:]]

    def partner_places(self, title: str) -> list[int]:
        """Those that the open rollout shows under a heading, after all of them are asked for."""
        for section in self.find(".pairs section"):
            if section.find_element(By.CSS_SELECTOR, "h4").text.startswith(title):
                for button in section.find_elements(By.CSS_SELECTOR, "button"):
                    self.driver.execute_script("arguments[0].click()", button)
                links = section.find_elements(By.CSS_SELECTOR, "a.partner")
                return [int(str(link.get_attribute("href")).rsplit("/", 1)[1]) for link in links]
        return []

    def complaints(self) -> list[str]:
        """What the console says: errors of the script, refusals of the policy, requests that failed."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    assert CHROMIUM and DRIVER
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-sync",
        "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--window-size=1400,900",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    browser.set_page_load_timeout(240)
    browser.set_network_conditions(offline=True, latency=0, throughput=0)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    made = made_run(tmp_path_factory.mktemp("runs"), num_steps=8, top_k=2)
    made.run_logger.note("WARNING: something to know")
    made.finish()
    return made


@pytest.fixture
def page(driver: webdriver.Chrome, run: MadeRun) -> Iterator[Page]:
    opened = Page(driver, run.path / "report.html")
    yield opened
    assert opened.complaints() == []


def anchor_of(page: Page, step: int) -> dict[str, Any]:
    """A rollout with partners of every kind."""
    [entry] = [entry for entry in page.data["rollouts"]["steps"] if entry["step"] == step]
    return next(r for r in entry["rollouts"] if all(partners(entry, r)))


def test_every_section_shows_what_it_is_for(page: Page) -> None:
    expected = {
        "overview": ["finished", "step 8 of 8", *NAMES, "WARNING: something to know"],
        "curves": ["Reward", "Held-out accuracy", "Entropy", "Gradient norm", "Any metric"],
        "similarity": ["Mean cosine", "step 8", "arithmetic / logic"],
        "map": ["24 rollouts", "step 8", "one plane for all steps".capitalize()],
        "rollouts": ["192 rollouts", "step 1"],
        "timings": ["Phases of a step", "rollout and rewards", "Peak memory"],
        "settings": ["checkpoint_every", "weight lambda of the cross-domain term", "domain logic"],
    }
    for section in SECTIONS:
        page.go(section)
        shown = page.text("#main")
        for words in expected[section]:
            assert words in shown, (section, words)
        assert page.text("nav a[aria-current]"), section
    assert page.find("#sections a:focus"), "a link that was followed keeps the focus"


def test_the_table_is_the_one_that_the_run_printed(page: Page, run: MadeRun) -> None:
    from megatron_mcpo.reporting.summary import summary_rows
    from megatron_mcpo.storage.files import read_jsonl

    _, rows = summary_rows(read_jsonl(run.path / "metrics.jsonl"), read_jsonl(run.path / "eval.jsonl"), NAMES)
    page.go("overview")
    shown = [row.text.split() for row in page.find("#section-overview tbody tr")]
    for cells, row in zip(shown, rows, strict=True):
        printed = [cell for i, cell in enumerate(row) if i != 4]  # the page leaves the factor out
        assert cells[0] == printed[0]
        assert list(map(float, cells[1:])) == pytest.approx(list(map(float, printed[1:])), abs=0.0011)


def test_curves_hide_domains_and_follow_the_keys(page: Page) -> None:
    page.go("curves")
    reward = ".charts figure:first-child"
    assert page.text(f"{reward} .legend").split() == [*NAMES, "all"]
    page.find(".toggle input")[1].click()
    assert page.text(f"{reward} .legend").split() == [NAMES[0], NAMES[2], "all"]
    chart = page.find(f"{reward} svg[tabindex]")[0]
    chart.send_keys(Keys.HOME)
    assert page.text(f"{reward} .readout").startswith("step 1: arithmetic ")
    chart.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.text(f"{reward} .readout").startswith("step 3: ")


def test_the_matrix_has_the_figures_of_its_step(page: Page) -> None:
    page.go("similarity")
    column = page.data["metrics"]["columns"]["contrast/similarity/arithmetic/cognition"]
    slider = page.find("#section-similarity input[type=range]")[0]
    for place, keys in ((7, Keys.END), (0, Keys.HOME), (1, Keys.ARROW_RIGHT)):
        slider.send_keys(keys)
        cells = [cell.text for cell in page.find(".matrix .cell")]
        assert float(cells[2]) == float(cells[6]) == pytest.approx(column[place], abs=0.0051)
    page.find(".matrix .cell")[5].click()
    assert "logic / cognition" in page.text(".beside .charts figcaption")


def test_the_browser_filters_by_domain_outcome_step_and_text(page: Page) -> None:
    page.go("rollouts")
    entries = page.data["rollouts"]["steps"]
    rows = [(entry, rollout) for entry in entries for rollout in entry["rollouts"]]

    def expect(number: int) -> None:
        if not number:
            page.wait(lambda: page.text(".summary") == "No rollout fits these filters.")
        else:
            page.wait(lambda: page.text(".summary").startswith(f"{number} rollouts"))
        assert len(page.find("a.row")) == min(50, number)

    expect(len(rows))
    page.choose("domain", "1")
    logic = [(e, r) for e, r in rows if e["groups"][r["group"]]["domain"] == 1]
    expect(len(logic))
    assert set(page.text(".row .domain").split()) == {"logic"}
    page.choose("outcome", "right")
    expect(sum(r["right"] for _, r in logic))
    page.choose("outcome", "wrong")
    expect(sum(not r["right"] for _, r in logic))
    assert not page.find("a.row.right")
    page.choose("step", "3")
    expect(sum(not r["right"] for e, r in logic if e["step"] == 3))
    for name in ("domain", "outcome", "step"):
        page.choose(name, "")
    page.find("input[name=anchors]")[0].click()
    expect(sum(any(r["partners"]) for _, r in rows))
    page.find("input[name=anchors]")[0].click()
    page.find("input[name=text]")[0].send_keys("Answer IS 7.")
    expect(sum("answer is 7." in (r["text"] + e["groups"][r["group"]]["prompt"]).lower() for e, r in rows))
    page.find("input[name=text]")[0].send_keys("nobody wrote this")
    expect(0)


def test_long_lists_are_turned(page: Page) -> None:
    page.go("rollouts")
    page.wait(lambda: page.text(".turning span") == "1 / 4")
    first = page.find("a.row")[0].get_attribute("href")
    page.driver.find_element(By.XPATH, "//div[@class='turning']/button[text()='Next']").click()
    page.wait(lambda: page.text(".turning span") == "2 / 4")
    assert page.find("a.row")[0].get_attribute("href") != first


def test_an_anchor_leads_to_its_positives_and_negatives_and_back(page: Page) -> None:
    page.go("rollouts")
    anchor = anchor_of(page, step=4)
    [entry] = [entry for entry in page.data["rollouts"]["steps"] if entry["step"] == 4]
    positives, together, negatives = partners(entry, anchor)
    page.choose("step", "4")
    page.choose("outcome", "right")
    page.driver.find_element(By.CSS_SELECTOR, f'a.row[href="#rollouts/4/{anchor["place"]}"]').click()
    page.wait(lambda: anchor["text"] in page.text(".detail pre"))
    assert page.text("a.row[aria-current]")
    assert entry["groups"][anchor["group"]]["prompt"] in page.text(".detail pre")
    assert page.partner_places("Positives of other domains") == positives
    assert page.partner_places("Positives of its domain") == together
    assert page.partner_places("Negatives") == negatives

    page.driver.find_element(By.CSS_SELECTOR, f'.pairs a.partner[href="#rollouts/4/{positives[0]}"]').click()
    page.wait(lambda: page.place() == [4, positives[0]])
    assert "right" in page.text(".detail h3") and anchor["place"] in page.partner_places("It is a positive of")
    page.driver.back()
    page.wait(lambda: page.place() == [4, anchor["place"]])
    page.driver.find_element(By.CSS_SELECTOR, f'.pairs a.partner[href="#rollouts/4/{negatives[-1]}"]').click()
    page.wait(lambda: "wrong" in page.text(".detail h3"))
    assert page.place() == [4, negatives[-1]]
    assert anchor["place"] in page.partner_places("It is a negative of")


def test_a_point_of_the_map_is_a_rollout(page: Page) -> None:
    page.go("map")
    points = page.data["map"]["steps"][-1]["points"]
    place, x, y, _ = points[:4]
    canvas = page.find("canvas.map")[0]
    page.driver.execute_script(
        "const [canvas, x, y] = arguments; const box = canvas.getBoundingClientRect(); const unit = box.width / 640;"
        "const at = (v) => (320 + v * 304 / 1000) * unit;"
        "canvas.dispatchEvent(new MouseEvent('click', {clientX: box.left + at(x), clientY: box.top + at(-y)}))",
        canvas, x, y,
    )  # fmt: skip
    page.wait(lambda: page.find(".detail h3"))
    assert page.place() == [8, place]


def test_the_theme_changes_and_nothing_sticks_out_at_either_size(page: Page) -> None:
    colours = set()
    for _ in range(2):
        page.find("#theme")[0].click()
        colours.add(page.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
    anchor = anchor_of(page, step=4)
    for width in (1400, 500):
        page.driver.set_window_size(width, 900)
        for section in SECTIONS:
            page.go(section)
            if section == "rollouts":
                page.open(4, anchor["place"])
            room = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert page.driver.execute_script(room) == 0, (width, section)
    page.driver.set_window_size(1400, 900)


def test_the_page_may_not_call_out_or_run_what_is_put_into_it(page: Page) -> None:
    asked = page.driver.execute_async_script(
        "const done = arguments[0];"
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hit=1\">');"
        "const refused = () => setTimeout(() => done(window.hit || 'refused'), 100);"
        "fetch('http://127.0.0.1:9/').then(() => done('sent'), refused)"
    )
    assert asked == "refused"
    complaints = page.complaints()
    assert complaints and all("Content Security Policy" in message for message in complaints), complaints


def visit_all(page: Page) -> str:
    """The text of all sections."""
    texts = []
    for section in SECTIONS:
        page.go(section)
        texts.append(page.text("#main"))
    assert page.complaints() == []
    return "\n".join(texts)


ATTACK = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'><svg onload=window.hit=1> {{data}}"


def test_what_a_model_wrote_is_only_ever_text(driver: webdriver.Chrome, tmp_path: Path) -> None:
    made = made_run(tmp_path, num_steps=2, text=lambda domain, number: f"{ATTACK} {number} \u202e\u2028")
    made.run_logger.note(ATTACK)
    page = Page(driver, made.finish())
    page.open(1, 0)
    assert ATTACK in page.text(".detail pre")
    assert ATTACK in visit_all(page)
    assert not page.find("#main img, #main script, #main [onerror], #main [onload]")
    assert driver.execute_script("return window.hit === undefined")


def test_a_run_without_contrastive_terms(driver: webdriver.Chrome, tmp_path: Path) -> None:
    page = Page(driver, made_run(tmp_path, num_steps=3, **OFF).finish())
    assert visit_all(page).count("Both contrastive terms are switched off") == 2
    page.open(2, 0)
    assert "switched off" in page.text(".detail")


def test_a_run_of_figures_that_are_no_numbers_or_do_not_move(driver: webdriver.Chrome, tmp_path: Path) -> None:
    made = MadeRun(config_of(tmp_path, num_steps=5))
    awkward = {
        "grad_norm": [float("nan"), 1.0, float("inf"), 2.0, float("nan")],
        "loss/policy": [float("nan")] * 5,
        "loss/kl": [1e-300] * 5,
        "lr": [1.0, 1.0 + 2e-16, 1.0, 1.0, 1.0],
        "contrast/alignment": [1e15, 1e15 + 1, 1e15, 1e15, 1e15],
        "contrast/uniformity": [-1e308, 1e308, 0.0, 0.0, 0.0],
        "entropy": [0.0] * 5,
        "time/step": [float("nan"), 3.2, 3.2, 3.2, 3.2],
    }
    for step in range(1, 6):
        made.step(step, metrics={name: values[step - 1] for name, values in awkward.items()})
    page = Page(driver, made.finish())
    text = visit_all(page)
    assert "NaN" not in text and "Infinity" not in text and "undefined" not in text
    page.go("curves")
    paths = " ".join(str(path.get_attribute("d")) for path in page.find(".charts path"))
    assert "NaN" not in paths and "Infinity" not in paths
    select = Select(page.find("#metric")[0])
    for name in ("grad_norm", "contrast/uniformity", "contrast/alignment", "lr", "loss/kl"):
        select.select_by_value(name)
        assert page.text("#section-curves section figcaption") == name
    assert page.complaints() == []


@pytest.mark.parametrize(("low", "high"), [
    ("0", "0"), ("1", "1 + Number.EPSILON"), ("-1e308", "1e308"), ("0", "5e-324"), ("1e15", "1e15 + 1"), ("NaN", "1"),
    ("-Infinity", "Infinity"), ("0", "1"), ("-3.7", "12.2"), ("999999.1", "999999.2"), ("2", "1"),
])  # fmt: skip
def test_an_axis_has_few_marks_whatever_the_values(driver: webdriver.Chrome, low: str, high: str) -> None:
    source = (ROOT / "megatron_mcpo" / "reporting" / "html" / "page" / "ticks.js").read_text()
    driver.get("about:blank")
    marks = driver.execute_script(f"{source}; return ticks({low}, {high})")
    assert len(marks) <= 12 and all(isinstance(mark, int | float) for mark in marks)
    assert marks == sorted(set(marks))
    if (low, high) == ("0", "1"):
        assert marks == [0, 0.2, 0.4, 0.6, 0.8, 1]


def test_a_run_of_one_step_and_one_of_none(driver: webdriver.Chrome, tmp_path: Path) -> None:
    page = Page(driver, made_run(tmp_path, name="one", num_steps=1).finish())
    assert "step 1 of 1" in visit_all(page)
    empty = MadeRun(config_of(tmp_path, name="none"))
    page = Page(driver, write_report(empty.path, empty.config))
    text = visit_all(page)
    for words in ("not finished", "step 0 of 6", "No training step is on file", "No rollouts are on file"):
        assert words in text, words
