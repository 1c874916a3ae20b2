"""./run.sh report: drawn in the real container from a made-up record, opened in a real browser."""

from __future__ import annotations

import re
import shutil
import struct
import time
from dataclasses import asdict
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from playwright.sync_api import Page, expect, sync_playwright

import history
import made_up
import publish
from keep_rule import geometric_mean
from measure import Run
from project import number
from record import Attempt
from repository import Project

HOSTILE = '</style></title></script><script>alert(1)</script><img src=x onerror=alert(1)>" onload="alert(1) $\\frac{'
OLD = 3  # experiments that are not comparable
LETTERS = 9  # pixels that a letter of the curve is high, at least
FEW = 5  # diffs in a page, for a test


@pytest.fixture(scope="module")
def empty(measured: Project, tmp_path_factory) -> Project:
    """A project with data and a plan of five phases, in which nothing is recorded."""
    made = measured.copy(tmp_path_factory.mktemp("report") / "repo")
    for n in made.experiments():
        made.git("update-ref", "-d", f"refs/experiments/{n}")
    shutil.rmtree(made.path / "runs")
    (made.path / ".git" / history.COMPARED).unlink(missing_ok=True)
    made.write("program.md", made_up.PLAN)
    made.git("commit", "-qam", "a plan of five phases")
    return made


@pytest.fixture(scope="module")
def drawn(empty: Project, tmp_path_factory) -> SimpleNamespace:
    """A project with a made-up day and its report."""
    project = empty.copy(tmp_path_factory.mktemp("drawn") / "repo")
    with made_up.day(project.path) as day:
        day.other_data(OLD)
        day.ideas(40, hostile=HOSTILE)
        day.audit(gallery=100)
        result = day.final(gallery=100)
        best = number(geometric_mean(day.history.incumbent))
    done = project.run("report")
    assert done.returncode == 0, done.stderr
    html = project.read("report.html")
    return SimpleNamespace(project=project, day=day, best=best, final=result, done=done, html=html)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as p:
        made = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])  # root's tests
        yield made
        made.close()


@pytest.fixture
def page(browser, drawn):
    """Opens the report at some width and colour scheme; whatever the page complains of or fetches fails the test."""
    opened, wrong = [], []

    def go(width: int = 1200, scheme: str = "light", anchor: str = "", clock: bool = False) -> Page:
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        opened.append(tab)
        tab.on("console", lambda m: wrong.append(m.text))
        tab.on("pageerror", lambda e: wrong.append(str(e)))
        tab.on("dialog", lambda d: (wrong.append(d.message), d.dismiss()))
        tab.on("request", lambda r: r.url.startswith(("file:", "data:")) or wrong.append(r.url))
        if clock:
            tab.clock.install()
        tab.goto(f"file://{drawn.project.path}/report.html{anchor}")
        return tab

    yield go
    for tab in opened:
        tab.close()
    assert not wrong


def test_nothing_to_show_is_said_in_one_line(empty: Project):
    done = empty.run("report")
    assert done.returncode == 2 and done.stdout == ""
    assert "nothing to show" in done.stderr and done.stderr.count("\n") == 1
    done = empty.run("refresh-report")  # in the background that is no failure
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (empty.path / "report.html").exists() and not (empty.path / "runs").exists()


def test_two_files_and_nothing_else(drawn):
    root = drawn.project.path
    assert drawn.done.stdout.split() == [f"{root}/report.html", f"{root}/progress.png"]
    assert drawn.project.git("status", "--porcelain") == "" and drawn.project.containers("-background") == ""
    assert not [f for f in (root / "runs").rglob("*") if f.is_file()]
    png = (root / "progress.png").read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG") and width == 1600 and 600 < height < 1000


def test_one_file_that_asks_for_nothing(drawn):
    found: list = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, given: found.extend((tag, *pair) for pair in given)
    parser.feed(drawn.html)
    targets = [value for _, name, value in found if name in ("src", "href", "xlink:href", "action", "srcset", "data")]
    assert len(targets) > 100 and all(t.startswith(("data:image/webp;", "#")) for t in targets)
    assert not [name for _, name, _ in found if name.startswith("on")]
    assert not re.search(r"https?://|@import|url\((?!#)", drawn.html)
    assert "default-src 'none'" in drawn.html and drawn.html.count("<script") == 1
    assert len(drawn.html) < 1_500_000


def test_the_figures_are_those_of_the_record(drawn, page):
    tab, day = page(), drawn.day
    assert drawn.best in tab.title()
    assert tab.locator("h1").inner_text().endswith(f"→ {drawn.best}")
    assert tab.locator(".row").count() == day.n
    assert tab.locator(".row.old").count() == OLD
    assert f"{OLD} experiments with other data" in tab.locator("body").inner_text()
    verdicts = drawn.project.git("for-each-ref", "--format=%(contents)", "refs/experiments")
    for verdict in ("kept", "discarded", "failed", "control"):
        count = verdicts.count(f"\nVerdict: {verdict}\n") - (OLD - 1) * (verdict == "discarded")
        assert count and tab.locator(f".row.{verdict}:not(.old)").count() == count
        assert tab.locator(f"#curve-v-{verdict} a").count() == count
        assert f"{count} {verdict}" in tab.locator(".tiles").first.inner_text()
    assert re.search(
        r"Time: \d\.\d h: training 1\d %, harness \d %, model 8\d %\. *$", tab.locator("p").first.inner_text()
    )
    text = tab.locator("body").inner_text()
    for shown in (
        "Audit: fresh seeds",
        "cannot be taken out alone",
        "fails: crash",
        "Final: the test split",
        "third",
        HOSTILE,
    ):
        assert shown in text
    looks = tab.locator(".tile").filter(has_text="evaluations of this split")
    assert looks.locator("b").inner_text() == str(drawn.final.test_evaluation) == "1"
    assert "chain, 1 of 2" in tab.locator(".row", has_text="chain, 1 of 2").first.text_content()


def test_a_point_leads_to_its_experiment_and_the_diff(drawn, page):
    tab = page()
    link = tab.locator("#curve-v-kept a").nth(3)
    target = tab.locator(link.get_attribute("href"))
    assert not target.locator("pre").is_visible()
    link.click()
    expect(target.locator("pre")).to_be_in_viewport()
    n = int(link.get_attribute("href")[2:])
    diff = drawn.project.git("show", "--format=", f"refs/experiments/{n}", "--", "train.py").split("\n@@")[1]
    for line in diff.splitlines()[1:]:
        assert line in target.locator("pre").inner_text()
    added = target.locator("pre .good").first
    assert added.inner_text().startswith("+")
    target.locator("summary").click()
    expect(target.locator("pre")).to_be_hidden()
    link.click()  # the address does not change, and it opens all the same
    expect(target.locator("pre")).to_be_visible()
    expect(page(anchor=f"#e{n}").locator(f"#e{n} pre")).to_be_visible()


def test_toggles_hide_rows_and_points(page):
    tab = page()
    for verdict in ("kept", "discarded", "failed", "control"):
        shown = tab.locator(f".row.{verdict}, #curve-v-{verdict} a")
        assert shown.first.is_visible() and shown.last.is_visible()
        tab.locator(f"#f-{verdict}").uncheck()
        for i in (0, shown.count() - 1):
            assert not shown.nth(i).is_visible()
    assert tab.locator(".row.baseline").first.is_visible()
    tab.locator("#f-kept").check()
    assert tab.locator(".row.kept").first.is_visible() and not tab.locator(".row.failed").first.is_visible()


def test_a_tab_left_open_reloads_and_stays_as_it_was(drawn, page):
    tab = page(clock=True)
    row = tab.locator(".row.kept").nth(2)
    row.locator("summary").click()
    tab.locator("#f-failed").uncheck()
    tab.evaluate("scrollTo(0, 700)")
    tab.evaluate("window.before = true")
    with tab.expect_event("load"):
        tab.clock.fast_forward(31_000)
    assert tab.evaluate("window.before") is None
    expect(row.locator("pre")).to_be_visible()
    expect(tab.locator("#f-failed")).not_to_be_checked()
    assert abs(tab.evaluate("scrollY") - 700) < 5
    tab.evaluate("document.body.dataset.made = 0; window.before = true")
    tab.clock.fast_forward(13 * 3600 * 1000)
    tab.clock.fast_forward(31_000)
    # the page is older than half a day: nobody looks any more
    assert tab.evaluate("window.before") is True


@pytest.mark.parametrize("width", [390, 768, 1600])
def test_no_horizontal_scroll_with_everything_open(page, width: int):
    tab = page(width)
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.locator("#curve").is_visible()
    assert all(name.is_visible() for name in tab.locator('[id^="curve-v-kept-"]').all())
    letters = tab.locator('[id^="curve-xtick"] text').first
    assert letters.bounding_box()["height"] > LETTERS


def test_light_dark_and_print(page, tmp_path):
    looks = {}
    for scheme in ("light", "dark"):
        tab = page(scheme=scheme)
        looks[scheme] = tab.evaluate(
            "[getComputedStyle(document.body), getComputedStyle(document.querySelector('#curve text'))]"
            ".map((s, i) => i ? s.fill : s.backgroundColor + s.color)"
        )
    assert all(a != b for a, b in zip(looks["light"], looks["dark"]))
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not tab.locator(".filters").is_visible()
    tab.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 50_000


def test_examples_mark_the_right_one(drawn, page):
    tab = page()
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    assert tab.locator(".example").count() == 6
    sides = tab.locator(".example > .side").all()
    assert len(sides) == 2 * 6
    for side in sides:
        for title, answers in ((side.locator("> span"), ".thumbs img"), (side.locator("summary"), "li")):
            rank = float(re.search(r"rank ([\d.]+)", title.inner_text())[1])
            marked = ["right" in (x.get_attribute("class") or "") for x in side.locator(answers).all()]
            assert len(marked) == 5 and (marked.index(True) + 1 if any(marked) else 6) == min(rank, 6)
    example = tab.locator(".example").first
    right = example.locator(".thumbs .right")
    assert example.locator("> img").evaluate("(i) => i.complete && i.naturalWidth") == 96
    if right.count():
        assert right.first.get_attribute("src") == example.locator("> img").get_attribute("src")


def test_refresh_is_silent_and_harmless(drawn, tmp_path):
    project = drawn.project.copy(tmp_path / "repo")
    before, error = project.read("report.html"), project.path / "runs" / "report.err"
    broken = project.run("refresh-report", env={"AR_ENGINE": "no-such-engine"})
    assert (broken.returncode, broken.stdout, broken.stderr) == (0, "", "") and project.read("report.html") == before
    assert "no-such-engine" in error.read_text() and error.read_text().count("\n") == 1
    assert re.search("^report: +could not be drawn: .*no-such-engine", project.run("status").stdout, re.M)
    assert project.run("report").returncode == 0 and not error.exists()
    assert project.run("refresh-report", env={"AR_ENGINE": "no-such-engine"}).returncode == 0 and error.exists()
    few = f"report.MAX_DETAILED = {FEW}"
    two = [project.start("refresh-report", given=few), project.start("refresh-report", given=few)]
    assert [(*p.communicate(), p.returncode) for p in two] == [("", "", 0)] * 2
    assert project.read("report.html") != before and project.read("report.html").endswith("</html>")
    assert not error.exists()
    assert 0 < project.read("report.html").count("<pre") <= FEW
    assert "Older ones have no diff here" in project.read("report.html") and "Older ones" not in before
    late = project.start("refresh-report")
    while late.poll() is None and not project.containers("-background"):
        time.sleep(0.1)
    project.run(given="engine.sweep(); raise SystemExit")
    assert project.containers("-background") and late.wait() == 0  # an experiment that ends meanwhile does not hit it
    assert sorted(f.name for f in project.path.glob("report.html*")) == ["report.html"]
    assert project.containers("-background") == ""


def test_a_day_that_has_just_begun_and_data_that_is_gone(empty: Project, tmp_path, browser):
    """One baseline alone, no examples, no audit: the page is there."""
    project = empty.copy(tmp_path / "repo")
    with made_up.day(project.path) as day:
        day.attempt("baseline", "", lambda: day.noisy(29))
    (project.path / "data/prints/val").rename(tmp_path / "val")
    done = project.run("report")
    assert done.returncode == 0, done.stderr
    tab = browser.new_page()
    tab.goto(f"file://{project.path}/report.html")
    assert tab.locator(".row").count() == 1 and tab.locator(".example").count() == 0
    tab.close()


ODD_RESULTS = {"none": None, "without runs": b'{"verdict": "kept"}', "with none": b'{"verdict": "kept", "runs": []}'}


def test_every_shape_that_a_record_can_have_is_drawn(empty: Project, tmp_path, browser):
    """Failed, by hand, unmeasured; audits of another metric, and with failed ablations alone; damaged results."""
    project = empty.copy(tmp_path / "repo")
    with made_up.day(project.path) as day:
        day.attempt("baseline", "", lambda: None)
        day.attempt("baseline", "", lambda: day.noisy(29))
        for n, (idea, rank) in enumerate({"crash": None, "worse": 60, "better": 12, "best": 6}.items()):
            day.attempt("candidate", idea, lambda rank=rank: rank, f"{day.code}\nODD = {n}\n")
        day.attempt("remeasured", "", lambda: None)
        day.attempt("remeasured", "", lambda: day.noisy(6))
        for idea, result in ODD_RESULTS.items():
            by_hand = Attempt("kept", f"{idea}, by hand", train=day.incumbent, by_hand=True, comparable=day.comparable)
            day.commit(by_hand.message(), day.code, {"result.json": result} if result is not None else {})
        day.audit(gallery=200)
        train = publish.Trainings.run
        publish.Trainings.run = lambda made, side, source: (
            fails(made, side) if "without" in side else train(made, side, source)
        )
        day.audit(gallery=200)
        day.edit("data: prints", "data: prints\nmetric: median_rank")
        day.audit(gallery=200)
        day.final(gallery=100)
    done = project.run("report")
    assert done.returncode == 0, done.stderr
    tab = browser.new_page()
    tab.goto(f"file://{project.path}/report.html")
    text = tab.locator("body").inner_text()
    assert "2 kept, 1 discarded, 1 failed" in text  # what was kept by hand was no try
    assert tab.locator(".row").count() == day.n and text.count("Audit: fresh seeds") == 3
    assert text.count("fails: crash") >= 3 and "nan" not in text.lower() and "undefined" not in text.lower()
    tab.close()


def fails(trainings: publish.Trainings, side: str) -> Run:
    trainings.runs.append({"side": side, **asdict(made_up.CRASH)})
    return made_up.CRASH


def test_a_clone_without_the_record(drawn, tmp_path):
    """Its branch still carries what was kept last."""
    project = drawn.project.copy(tmp_path / "repo")
    n = drawn.day.parent.rpartition("/")[2]
    project.git("reset", "-q", "--hard", f"refs/experiments/{n}")
    for other in project.experiments():
        project.git("update-ref", "-d", f"refs/experiments/{other}")
    done = project.run("report")
    assert done.returncode == 0, done.stderr
    assert f'id="e{n}"' in project.read("report.html")


def test_a_part_of_the_record_without_the_incumbent_is_refused_in_one_line(empty: Project, tmp_path):
    project = empty.copy(tmp_path / "repo")
    with made_up.day(project.path) as day:
        day.attempt("baseline", "", lambda: day.noisy(29))
        day.attempt("candidate", "worse", lambda: 60, f"{day.code}\nWORSE = 1\n")
        day.branch = "another"
        day.attempt("candidate", "better", lambda: 15, f"{day.code}\nBETTER = 1\n")
    project.git("update-ref", "-d", "refs/experiments/1")
    done = project.run("report")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert "fetch" in done.stderr and "IndexError" not in done.stderr
