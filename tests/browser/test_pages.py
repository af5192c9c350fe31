"""The reports in a real browser: quiet, asking for nothing, sortable, readable in both themes, narrow, wide, on paper.

Needs Playwright's Python package (the extra `browser`) and a Chromium or Chrome of the system; skipped without.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.study.folders import HOSTILE, a_run, a_suite, add_measurements

from fedloom.study.report import write_report

ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PAGES = ("run", "hostile", "several", "suite", "thousand")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Return a browser that asks for nothing by itself."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install 'fedloom[browser]'")
    named = os.environ.get("FEDLOOM_CHROMIUM")
    found = [shutil.which(name) for name in (named, "chromium", "chromium-browser", "google-chrome") if name]
    path = found[0] if named else next(filter(None, found), None)
    if path is None and named:
        pytest.fail(f"FEDLOOM_CHROMIUM names {named}, and there is no such program")
    if path is None:
        pytest.skip("no browser: install chromium, or name one in FEDLOOM_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield one
        one.close()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a page of each kind, made once."""
    folder = tmp_path_factory.mktemp("pages")
    a_run(folder / "a run", categories=["law", "mail", "news", "code"], rounds=6).close()
    add_measurements(folder / "a run")
    recipe = "# </pre></script><script>alert(2)</script>\nmodel: builtin\n"
    a_run(folder / "hostile", clients=HOSTILE, categories=HOSTILE[:3], recipe=recipe, rounds=3).close()
    for name, level, wire in (("rank4", 0.78, 60_000), ("rank16", 0.85, 231_424), ("a" * 90, 0.5, 8_000)):
        a_run(folder / name, level=level, wire=wire, rounds=3, settings={"lora_r": wire}).close()
    a_suite(folder / "suite", failed=1)
    clients = [f"site-{i:04d}" for i in range(1000)]
    a_run(folder / "thousand", clients=clients, categories=["x", "y", "z"], rounds=3).close()
    add_measurements(folder / "thousand")
    several = [folder / "rank4", folder / "rank16", folder / ("a" * 90)]
    return {
        "run": write_report(folder / "a run"),
        "hostile": write_report(folder / "hostile"),
        "several": write_report(several, folder / "several.html"),
        "suite": write_report(folder / "suite"),
        "thousand": write_report(folder / "thousand"),
    }


class Opened(NamedTuple):
    page: Any
    heard: list[str]  # what the browser complained about, and dialogs
    asked: list[str]  # requests
    url: str


@pytest.fixture
def opened(browser: Any, files: dict[str, Path]) -> Iterator[Callable[..., Opened]]:
    """Return `open(name, width=1280, scheme="light", script=True)`."""
    contexts = []

    def open_page(name: str, width: int = 1280, scheme: str = "light", script: bool = True) -> Opened:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        heard: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
        context.on("request", lambda request: asked.append(request.url))
        url = files[name].resolve().as_uri()
        page.goto(url)
        return Opened(page, heard, asked, url)

    yield open_page
    for context in contexts:
        context.close()


CONTRAST = """() => {
  const parse = (text) => { const p = text.match(/[\\d.]+/g).map(Number); return p.length < 4 ? [...p, 1] : p; };
  const light = ([r, g, b]) => {
    const part = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return [255, 255, 255, 1];
  };
  const faint = [];
  let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE", "title"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    if (element.getClientRects().length === 0) continue;
    const colour = parse(element.namespaceURI.includes("svg") ? style.fill : style.color);
    const [a, b] = [light(colour), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    seen += 1;
    if (ratio < 4.5 || colour[3] < 1 || style.opacity < 1)
      faint.push(`${ratio.toFixed(2)} ${element.tagName} ${walker.currentNode.data.trim().slice(0, 40)}`);
  }
  const graphics = [];
  const root = getComputedStyle(document.documentElement);
  const probe = document.body.appendChild(document.createElement("i"));
  for (const name of ["arm-base", "arm-local", "arm-federated", "arm-global", "arm-other", "series-0", "series-1",
      "series-2", "series-3", "series-4", "series-5", "series-6", "series-7"]) {
    probe.style.color = root.getPropertyValue("--" + name);
    probe.style.backgroundColor = root.getPropertyValue("--card");
    const style = getComputedStyle(probe);
    const [a, b] = [light(parse(style.color)), light(parse(style.backgroundColor))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 3) graphics.push(name);
  }
  probe.remove();
  return {faint, graphics, seen, paper: getComputedStyle(document.body).backgroundColor};
}"""


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_quiet_and_ask_for_nothing(opened: Callable[..., Opened], name: str) -> None:
    one = opened(name)
    assert one.page.evaluate("document.querySelectorAll('svg').length") >= 3
    assert one.page.evaluate("[...document.querySelectorAll('img, iframe, object, link, form')].length") == 0
    assert one.page.evaluate("document.scripts.length") == 1
    one.page.mouse.move(640, 500)
    assert one.page.evaluate("performance.getEntriesByType('resource').length") == 0
    assert (one.heard, one.asked) == ([], [one.url])


def test_no_other_script_runs(opened: Callable[..., Opened]) -> None:
    one = opened("run")
    one.page.evaluate(
        "() => { const s = document.createElement('script'); s.text = 'window.ran = 1'; document.body.append(s);"
        " const i = document.createElement('img'); i.src = 'https://example.org/x.png'; document.body.append(i); }"
    )
    assert one.page.evaluate("window.ran === undefined")
    assert len(one.heard) == 2 and all("Content Security Policy" in text for text in one.heard)


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_the_screen(opened: Callable[..., Opened], name: str) -> None:
    page = opened(name).page
    for width in (1280, 768, 360):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = page.evaluate(
            "(width) => [...document.querySelectorAll('h1, h2, h3, p, nav, figure, svg, .tile, .scroll, pre, .filter')]"
            ".filter((x) => x.getBoundingClientRect().right > width + 0.5).map((x) => x.outerHTML.slice(0, 80))",
            width,
        )
        assert wide == [], width


@pytest.mark.parametrize("name", ["run", "several", "suite"])
def test_text_stands_out_in_both_themes(opened: Callable[..., Opened], name: str) -> None:
    page = opened(name).page
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    for scheme, paper in (("light", "rgb(246, 245, 242)"), ("dark", "rgb(20, 23, 27)")):
        page.emulate_media(color_scheme=scheme)
        found = page.evaluate(CONTRAST)
        assert found["paper"] == paper
        assert found["faint"] == [], scheme
        assert found["graphics"] == [], scheme
        assert found["seen"] > 200


COLUMN = """([label, column]) => [...document.querySelector(`table[aria-label="${label}"]`).tBodies[0].rows]
  .map((row) => row.cells[column].textContent.trim())"""
SORTED = """(label) => [...document.querySelector(`table[aria-label="${label}"]`).tHead.rows[0].cells]
  .map((head) => head.getAttribute("aria-sort"))"""


def test_tables_are_sorted_by_click_and_by_keyboard(opened: Callable[..., Opened]) -> None:
    page = opened("run").page
    rows = page.evaluate(COLUMN, ["Clients", 0])
    assert rows[0] == "skill 7"
    table = page.locator('table[aria-label="Clients"]')
    column = [head.strip() for head in table.locator("thead th").all_inner_texts()].index("federated")
    assert page.evaluate(SORTED, "Clients") == [None] * table.locator("thead th").count()

    button = table.locator("thead button").nth(column)
    button.click()  # numbers from the largest
    falling = page.evaluate(COLUMN, ["Clients", column])
    assert falling == sorted(falling, key=lambda text: -float(text.split()[0]))
    assert len(set(falling)) > 4
    assert page.evaluate(SORTED, "Clients")[column] == "descending"
    button.focus()
    page.keyboard.press("Enter")
    assert page.evaluate(COLUMN, ["Clients", column]) == falling[::-1]
    assert page.evaluate(SORTED, "Clients")[column] == "ascending"
    page.keyboard.press("Shift+Tab")  # to the column before
    page.keyboard.press("Space")
    heads = page.evaluate(SORTED, "Clients")
    assert heads[column - 1] == "descending" and heads.count(None) == len(heads) - 1

    table.locator("thead button").first.click()  # names from the first, numbers in them by their size
    assert page.evaluate(COLUMN, ["Clients", 0]) == [f"skill {i}" for i in range(8)]


def test_what_was_not_measured_comes_last_either_way(opened: Callable[..., Opened]) -> None:
    page = opened("run").page
    heads = page.locator('table[aria-label="Costs"] thead button')
    for _ in range(2):
        heads.nth(1).click()
        arms = page.evaluate(COLUMN, ["Costs", 0])
        assert arms[0] == "federated" and page.evaluate(COLUMN, ["Costs", 1])[1:] == ["–"] * 3
    seconds = [head.strip() for head in heads.all_inner_texts()].index("training")
    heads.nth(seconds).click()
    assert page.evaluate(COLUMN, ["Costs", 0])[-1] == "base"


def test_a_sort_goes_by_the_value_and_not_by_the_text(opened: Callable[..., Opened]) -> None:
    page = opened("several").page
    page.locator('table[aria-label="Costs"] thead button').nth(2).click()
    assert page.evaluate(COLUMN, ["Costs", 2])[:3] == ["231 kB", "60.0 kB", "8.0 kB"]


def test_long_tables_can_be_filtered(opened: Callable[..., Opened]) -> None:
    page = opened("suite").page
    place = page.locator('label.filter:has(+ .scroll[aria-label="Differences"])')
    visible = page.locator('table[aria-label="Differences"] tbody tr:visible')
    everything = visible.count()
    place.locator("input").fill("federated global  loss")
    shown = visible.all_inner_texts()
    assert 0 < len(shown) < everything
    assert all("federated − global" in row and "loss" in row for row in shown)
    assert place.locator("output").inner_text() == f"{len(shown)} of {everything} rows"
    page.locator('table[aria-label="Differences"] thead button').first.click()  # a sort keeps the filter
    assert visible.count() == len(shown)
    place.locator("input").fill("")
    assert visible.count() == everything
    assert page.locator('.scroll[aria-label="Runs"]').count() == 1


def test_without_scripts_the_page_is_whole(opened: Callable[..., Opened]) -> None:
    page = opened("suite", script=False).page
    assert page.locator("button").count() == 0
    assert page.locator("input").count() == 0
    assert page.locator('table[aria-label="Equal rounds"] tbody tr').count() == 24
    assert "federated" in page.locator('table[aria-label="Equal rounds"]').inner_text()


def test_only_what_scrolls_takes_a_stop_of_the_tab_key(opened: Callable[..., Opened]) -> None:
    stops = "[...document.querySelectorAll('.scroll[tabindex]')].length"
    wide, narrow = (opened("run", width=width).page.evaluate(stops) for width in (1280, 360))
    assert narrow > wide


def test_values_show_where_the_pointer_rests(opened: Callable[..., Opened]) -> None:
    page = opened("run").page
    hits = page.evaluate(
        """() => [...document.querySelectorAll('figure')].map((figure) => {
          const tip = [...figure.querySelectorAll('.tips > *')].pop();
          tip.scrollIntoView({block: "center"});
          const box = tip.getBoundingClientRect();
          const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
          return top.parentElement.className.baseVal === "tips" && top.querySelector("title").textContent.length > 5;
        })"""
    )
    assert len(hits) == 10 and all(hits)


def test_the_list_of_sections_leads_to_them(opened: Callable[..., Opened]) -> None:
    one = opened("run")
    links = one.page.locator("nav a")
    assert links.count() >= 8
    links.get_by_text("Clients", exact=True).click()
    assert one.page.evaluate("document.querySelector('#clients').getBoundingClientRect().top") < 200
    assert one.asked == [one.url]


@pytest.mark.parametrize("name", ["run", "suite"])
def test_on_paper_all_is_there_and_fits(opened: Callable[..., Opened], name: str) -> None:
    page = opened(name, width=688, scheme="dark").page  # A4 within its margins
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    found = page.evaluate(CONTRAST)
    assert found["paper"] == "rgb(255, 255, 255)"  # whatever the theme
    assert found["faint"] == []
    assert page.evaluate("[...document.querySelectorAll('details')].every((one) => one.open)")
    assert page.locator("nav:visible, .filter:visible").count() == 0
    beyond = """([what, width]) => [...document.querySelectorAll(what)].filter((x) =>
      x.getBoundingClientRect().right > width + 0.5).map((x) => x.outerHTML.slice(0, 160))"""
    assert page.evaluate(beyond, [".scroll:not(.wide) table, svg, pre, h1, p", 688]) == []
    page.set_viewport_size({"width": 1047, "height": 700})  # wide tables lie across
    assert page.locator(".wide").count() >= 1
    assert page.evaluate(beyond, [".wide table", 1047]) == []
    clips = "[...document.querySelectorAll('.scroll')].some((x) => getComputedStyle(x).overflowY !== 'visible')"
    assert not page.evaluate(clips)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not page.evaluate("[...document.querySelectorAll('details')].some((one) => one.open)")
    assert page.pdf(format="A4").startswith(b"%PDF")
