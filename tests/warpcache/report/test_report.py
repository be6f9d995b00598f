"""The report: one record behind page, table and JSON; the page stands alone and shows its numbers."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from warpcache.engine.errors import InputError
from warpcache.engine.promise.calibration import Quality
from warpcache.engine.telemetry import SessionStatistics
from warpcache.media.video import VideoWriter, read_video
from warpcache.report.drawing import Chart, drawing
from warpcache.report.page import LegendEntry, Section
from warpcache.report.policies import environment, figures_of, policy_title, print_table, row, write_json, write_report
from warpcache.report.results import PolicyResult, ReportData
from warpcache.report.routed import Routed, Within
from warpcache.report.tables import Column, Sheet

WHOLE, TRUTH = "whole generator", "rendered truth"


def full(frames: int = 40) -> PolicyResult:
    rng = np.random.default_rng(0)
    identical = {"psnr_db": 100.0, "ssim": 1.0, "flip": 0.0}
    truth = {"psnr_db": 33.41, "ssim": 0.9702, "flip": 0.0412}
    return PolicyResult(
        policy="full",
        latency_ms=tuple(rng.normal(41, 0.5, frames)),
        ages=(0,) * frames,
        routes=("whole",) * frames,
        fps=24.1,
        quality_against={WHOLE: identical, TRUTH: truth},
        quality_by_age={WHOLE: {0: identical}, TRUTH: {0: truth}},
    )


def cached(frames: int = 40, policy: str = "async") -> PolicyResult:
    rng = np.random.default_rng(1)
    return PolicyResult(
        policy=policy,
        latency_ms=tuple(rng.normal(3.3, 0.05, frames)),
        ages=tuple(1 + t % 3 for t in range(frames)),
        routes=("plain",) + ("warp",) * (frames - 1),
        fps=29.97,
        quality_against={
            WHOLE: {"psnr_db": 37.217, "ssim": 0.98014, "flip": 0.03011},
            TRUTH: {"psnr_db": 33.119, "ssim": 0.96883, "flip": 0.04309},
        },
        quality_by_age={
            WHOLE: {age: {"psnr_db": 39.0 - age, "ssim": 0.99 - age / 100, "flip": age / 50} for age in (1, 2, 3)},
            TRUTH: {age: {"psnr_db": 34.0 - age, "ssim": 0.98 - age / 100, "flip": age / 40} for age in (1, 2, 3)},
        },
    )


def test_row_is_the_record_of_the_schema() -> None:
    result = PolicyResult("every:2", [4.0, 1.0, 3.0, 2.0], [0, 1, 0, 1], ["plain", "warp", "plain", "warp"], 50)
    found = row(result)
    # Linear interpolation by hand: p50 lies between the 2nd and 3rd of 4, p95 at rank 2.85, p99 at rank 2.97.
    assert found["latency_ms"] == {
        "p50": pytest.approx(2.5),
        "p95": pytest.approx(3.85),
        "p99": pytest.approx(3.97),
        "max": 4.0,
    }
    assert found["age"] == {"mean": 0.5, "max": 1}
    assert found["routes"] == {"plain": 2, "warp": 2}
    assert (found["policy"], found["frames"], found["fps"], found["quality"]) == ("every:2", 4, 50.0, None)
    measured = row(cached())
    assert measured["quality"] == {"against": WHOLE, "psnr_db": 37.217, "ssim": 0.98014, "flip": 0.03011}
    assert [quality["against"] for quality in measured["quality_against"]] == [WHOLE, TRUTH]


def test_row_refuses_nothing_and_unequal_lists() -> None:
    with pytest.raises(InputError, match="policy 'async' answered no frame"):
        row(PolicyResult("async", [], [], [], 0))
    with pytest.raises(InputError, match="policy 'async' has 2 latencies, 1 ages and 2 routes"):
        row(PolicyResult("async", [1, 2], [0], ["warp", "warp"], 1))


def test_json_is_strict_and_carries_the_environment(tmp_path: Path) -> None:
    odd: dict[str, Any] = row(cached()) | {"nan": float("nan"), "inf": np.float32(np.inf), "count": np.int64(3)}
    write_json(tmp_path / "new" / "m.json", "warpcache bench head.warp", [row(full()), odd])
    text = (tmp_path / "new" / "m.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    document = json.loads(text)
    assert list(document) == ["schema", "command", "environment", "rows"]
    assert (document["schema"], document["command"]) == (1, "warpcache bench head.warp")
    assert document["rows"][0] == row(full())
    assert [document["rows"][1][key] for key in ("nan", "inf", "count")] == [None, None, 3]
    assert document["environment"] == environment()
    assert document["environment"]["packages"]["numpy"] == np.__version__
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["m.json"]


def test_json_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot write '.*': it is a folder"):
        write_json(tmp_path, "x", [])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write '.*m.json': "):
        write_json(tmp_path / "file" / "m.json", "x", [])


def test_figures_compare_two_policies_and_only_two() -> None:
    rows = [row(full()), row(cached())]
    by_label = {(figure.group, figure.label): figure for figure in figures_of(rows)}
    p50 = by_label["latency", "p50 ms"]
    factor = rows[0]["latency_ms"]["p50"] / rows[1]["latency_ms"]["p50"]
    assert (p50.change, p50.better) == (f"{factor:.1f}×", True)
    psnr = by_label[f"against the {TRUTH}", "PSNR dB ↑"]
    assert (psnr.values, psnr.change, psnr.better) == (("33.41", "33.12"), "-0.29", False)
    flip = by_label[f"against the {TRUTH}", "FLIP ↓"]
    assert (flip.change, flip.better) == ("+0.0019", False)
    assert by_label[f"against the {WHOLE}", "SSIM ↑"].values == ("itself", "0.9801")
    assert (f"against the {WHOLE}", "LPIPS ↓") not in by_label
    three = figures_of([*rows, row(cached(policy="every:4"))])
    assert all(len(figure.values) == 3 and not figure.change for figure in three)
    swapped = {figure.label: figure for figure in figures_of(rows[::-1]) if figure.group == "latency"}
    assert swapped["p50 ms"].better is False


def test_table_shows_every_figure_and_the_words_around_it() -> None:
    console = Console(file=io.StringIO(), width=100)
    print_table([row(full()), row(cached())], title="Synthetic [head]", caption="Every 5th.", console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("Synthetic [head]", "Every 5th.", "full", "async", "against the rendered truth", "37.22", "0.0431"):
        assert part in text
    assert re.search(r"p50 ms +\d+\.\d\d +3\.\d\d +1\d\.\d×", text)


def test_table_of_rows_without_quality() -> None:
    console = Console(file=io.StringIO(), width=80)
    print_table([row(PolicyResult("lockstep:2", [1.0], [0], ["plain"], 9))], console=console)
    assert "against" not in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("policy", "title"),
    [
        ("full", "Whole generator"),
        ("async", "Cut and cached"),
        ("every:4", "Cache every 4 frames"),
        ("lockstep:2", "Cache 2 frames old"),
        ("sliced", "sliced"),
    ],
)
def test_policies_have_titles(policy: str, title: str) -> None:
    assert policy_title(policy) == title


class Page(HTMLParser):
    """What the tests want to know about a page: balance of tags, attributes, ids, text."""

    VOID = frozenset(["meta", "link", "br", "img", "input", "hr"])

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "frames.mp4"
    with VideoWriter(path, 30, (16, 32)) as writer:
        for t in range(3):
            writer.write(np.full((3, 16, 32), t / 5, np.float32))
    return path


def test_page_stands_alone_and_shows_its_numbers(tmp_path: Path, video: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, ReportData("Head <1> & co", "Every 5th frame.", [full(), cached()], video))
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []

    # Nothing is loaded from anywhere: no address, and whatever refers refers into the page or holds its data.
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html), re.IGNORECASE)
    assert "@import" not in html
    for tag, name, value in page.attributes:
        if name in ("src", "href", "xlink:href", "poster", "srcset", "data", "action"):
            assert value.startswith(("#", "data:")), (tag, name, value[:60])
        for target in re.findall(r"url\(([^)]*)\)", value):
            assert target.startswith("#")
    assert not {tag for tag, _, _ in page.attributes} & {"script", "link", "iframe", "img", "object"}

    # Charts share the page: their ids do not collide, and what they use is there.
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for _, name, value in page.attributes if name == "href"}
    used |= set(re.findall(r"url\(#([^)]*)\)", html))
    assert used <= set(ids)
    # latency over time, its distribution, ages, and PSNR, SSIM, FLIP over age
    assert sum(tag == "svg" and name == "viewbox" for tag, name, _ in page.attributes) == 6
    assert not re.search(r"#0[1-3a]0[0-9a-f]0[0-9]", html), "a stand-in colour was left in a chart"

    text = " ".join(" ".join(page.text).split())
    for part in ("Head <1> & co", "Every 5th frame.", "Whole generator", "Cut and cached", "PSNR over age"):
        assert part in text
    first, last = row(full()), row(cached())
    for value in (first["latency_ms"]["p50"], last["latency_ms"]["p99"], last["age"]["mean"], 37.22, 33.12):
        assert f"{value:.2f}" in text
    assert np.__version__ in text

    (source,) = [value for tag, name, value in page.attributes if (tag, name) == ("video", "src")]
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(base64.b64decode(source.removeprefix("data:video/mp4;base64,"), validate=True))
    assert read_video(copy).frames.shape == (3, 3, 16, 32)


def routed(policy: str = "async") -> PolicyResult:
    """The cached policy's figures as those of a routed one."""
    asked = Quality("flip", 0.05, confidence=0.9)
    did = Routed(asked, None, 30, (0.02, 0.04), {"cheaper exit": 3}, SessionStatistics(audits=4, audit_misses=1))
    return replace(cached(policy=policy), routed=did, within=Within(asked, 37, 40))


def test_a_routed_policy_is_told_from_the_fixed_one(tmp_path: Path) -> None:
    results = [full(), cached(), routed(), routed("full")]
    rows = [row(result) for result in results]
    assert [r["policy"] for r in rows] == ["full", "async", "async", "full"]
    assert rows[2]["promise"]["predicted_mean"] == pytest.approx(0.03)
    assert rows[2]["within"]["share"] == pytest.approx(0.925)
    by_label = {figure.label: figure for figure in figures_of(rows) if figure.group == "quality promise"}
    assert by_label["FLIP <= 0.05, promised"].values == ("–", "–", "90%", "90%")
    assert by_label["FLIP <= 0.05, measured"].values == ("–", "–", "92.5%", "92.5%")
    assert by_label["audits, misses"].values == ("–", "–", "4, 1", "4, 1")
    answered = {figure.label: figure.values for figure in figures_of(rows) if figure.group == "answered by"}
    assert answered["warp"] == ("–", "97.5%", "97.5%", "97.5%")
    # A routed full is not the whole generator's own answer.
    psnr = next(f for f in figures_of(rows) if f.group == f"against the {WHOLE}" and f.label == "PSNR dB ↑")
    assert psnr.values == ("itself", "37.22", "37.22", "37.22")
    assert not {figure.group for figure in figures_of(rows[:2])} & {"quality promise", "answered by"}

    console = Console(file=io.StringIO(), width=140)
    print_table(rows, console=console)
    assert re.search(r"full +async +async routed +full routed", console.file.getvalue())  # type: ignore[attr-defined]
    write_report(tmp_path / "r.html", ReportData("t", "", results))
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert Page(html).open == []
    for words in ("Cut and cached, routed", "<code>full routed</code>", "FLIP &lt;= 0.05, promised"):
        assert words in html


def test_sections_join_the_page(tmp_path: Path) -> None:
    with drawing("section", wide=True) as (axes, svg):
        axes.plot([1, 2], [3, 4])
    sheet = Sheet("Table <A>", [Column("name"), Column.number("value", ".1f")], [("warp & co", 1.5)], "How to read it.")
    section = Section(
        "What it promises",
        ["A sentence."],
        [LegendEntry(1, "cache 1 frame old")],
        [Chart("Front", "", svg(), True)],
        [sheet],
    )
    write_report(tmp_path / "r.html", ReportData("t", "", [full(), cached()], sections=[section]))
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.open == []
    text = " ".join(" ".join(page.text).split())
    parts = (
        "What it promises",
        "A sentence.",
        "cache 1 frame old",
        "Front",
        "Table <A>",
        "warp & co",
        "How to read it.",
    )
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)
    assert text.index("Over time") < text.index("What it promises") < text.index("Measured on")
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    table = io.StringIO()
    Console(file=table, width=80).print(Sheet("[t]", [Column("[a]")], [("[b]x[/b]",)]).table())
    assert all(text in table.getvalue() for text in ("[t]", "[a]", "[b]x[/b]"))  # names out of a file are no markup


def test_pages_of_other_shapes(tmp_path: Path) -> None:
    """One policy, many policies, no quality, no video, identical answers, a single frame."""
    alone = PolicyResult("full", [5.0], [0], ["whole"], 200)
    exact = PolicyResult(
        "lockstep:0",
        [5.0, 5.1],
        [0, 0],
        ["plain", "plain"],
        200,
        {WHOLE: {"psnr_db": 100.0, "ssim": 1.0}},
        {WHOLE: {0: {"psnr_db": 100.0, "ssim": 1.0}}},
    )
    many = [full(), *(cached(policy=f"every:{n}") for n in range(2, 9)), cached()]
    for number, results in enumerate(([alone], [exact], many)):
        path = tmp_path / f"{number}.html"
        write_report(path, ReportData("t", "", results))
        page = Page(path.read_text(encoding="utf-8"))
        assert page.open == []
        assert not any(tag == "video" for tag, _, _ in page.attributes)
    assert "over age</h3>" not in (tmp_path / "1.html").read_text()


def test_the_same_data_give_the_same_page(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(tmp_path / name, ReportData("t", "c", [full(), cached()]))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_reports_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a report needs at least one policy's result"):
        write_report(tmp_path / "r.html", ReportData("t", "", []))
    with pytest.raises(InputError, match=r"the report's video '.*none.mp4' cannot be read"):
        write_report(tmp_path / "r.html", ReportData("t", "", [full()], tmp_path / "none.mp4"))
    assert list(tmp_path.iterdir()) == []
