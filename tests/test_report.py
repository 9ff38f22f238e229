"""The report page: figures as data, their drawings, and one page from every kind of source."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import bitsandheads as bh
from bitsandheads.cli import app
from bitsandheads.eval.report import content, page, svg
from bitsandheads.eval.report.figures import Axis, Bar, Bars, Chart, Grid, Point, Section, Series, Table, bounds, number, pareto, ticks
from bitsandheads.eval.report.sources import ReportError, read
from bitsandheads.eval.runs import RunFolder

# -- figures as data ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0, 1)), min_size=1, max_size=30), st.sampled_from([1, -1]))
def test_the_front_is_what_nothing_beats(points, better):
    front = pareto(points, better)
    for x, y in points:
        beaten = any((a <= x and better * b > better * y) or (a < x and b == y) for a, b in points)
        assert ((x, y) in front) != beaten
    assert list(front) == sorted(front)


@given(st.floats(1e-6, 1e6), st.floats(1.001, 1e6), st.booleans())
def test_ticks_lie_within(low, factor, log):
    high = low * factor
    found = ticks(low, high, log)
    assert found == sorted(found) and 2 <= len(found) <= 7
    assert all(low - 1e-9 * high <= t <= high * (1 + 1e-9) for t in found)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9), st.booleans())
def test_bounds_hold_the_values(values, log):
    low, high = bounds(Axis("x", log=log), values)
    assert low < min(values) <= max(values) < high and math.isfinite(low) and math.isfinite(high)
    with pytest.raises(ValueError, match="No finite values"):
        bounds(Axis("x", log=log), [math.nan])


def test_numbers_for_readers():
    assert [number(x) for x in (0.01234, 12.345, 1234.0, 131072, 2.5e9)] == ["0.0123", "12.3", "1234", "131k", "2.5G"]


# -- drawings -----------------------------------------------------------------------------------------------------------------

CHART = Chart(
    "a < b", "", Axis("x", log=True), Axis("share", percent=True),
    (Series("one", (Point(1, 0.5, 0.4, 0.6, "tip & more", "label"), Point(10, 0.9, 0.8, 1.0, "second")), 0, line=True),
     Series("two", tuple(Point(2**i, 0.1 * i) for i in range(4)), 9)),
    ((1, 0.5), (10, 0.9)),
)  # fmt: skip
BARS = Bars("lengths", "", Axis("tokens"), (Bar("a", 10, 0, tip="ten"), Bar("b", 30, 1, 25, 35, "thirty")))
GRID = Grid(
    "map", "", ("0%", "100%"), ("512", "1024"), "depth", "tokens", ((1.0, None), (0.0, 0.5)), 0, 1, True, ((True, False), (False, False))
)


@pytest.mark.parametrize("figure", [CHART, BARS, GRID], ids=["chart", "bars", "grid"])
def test_a_drawing_is_well_formed_and_within_its_frame(figure):
    root = ElementTree.fromstring(svg.draw(figure))
    _, _, width, height = map(float, root.get("viewBox").split())
    for e in root.iter():
        for name, limit in (("x", width), ("x1", width), ("x2", width), ("cx", width), ("y", height), ("y1", height), ("cy", height)):
            assert 0 <= float(e.get(name, 0)) <= limit, ElementTree.tostring(e)
    assert root.get("aria-label") == figure.title


def test_values_are_drawn_where_they_belong():
    root = ElementTree.fromstring(svg.draw(CHART))
    first, second = (e for e in root.iter("circle"))
    assert (first.get("data-tip"), second.get("data-tip")) == ("tip & more", "second")
    assert float(first.get("cx")) < float(second.get("cx")) and float(first.get("cy")) > float(second.get("cy"))
    spans = [e for e in root.iter("line") if "span" in e.get("class")]
    assert float(spans[0].get("y1")) > float(first.get("cy")) > float(spans[0].get("y2"))
    cells = [e for e in ElementTree.fromstring(svg.draw(GRID)).iter("rect")]
    assert [c.get("style") for c in cells] == ["--share:1.000", "--share:0.000", "--share:0.500"]
    assert [c.get("class") for c in cells] == ["cell marked", "cell", "cell"]
    lengths = [float(e.get("width")) for e in ElementTree.fromstring(svg.draw(BARS)).iter("rect")]
    assert lengths[1] == pytest.approx(3 * lengths[0], rel=0.01)


# -- the page -----------------------------------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Tags that close, and addresses."""

    EMPTY = ("meta", "input", "circle", "rect", "line", "polyline", "polygon")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("href", "src", "data", "action")]

    def handle_endtag(self, tag):
        assert tag in self.EMPTY or self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def record(plan: str, task: str, id: int, score: float, **more) -> dict:
    size = dict(cache_bytes={"bf16": 3200, "balanced": 400}[plan], full_bytes=3200)
    figures = dict(output_tokens=10, prompt_tokens=90, repetition=0.0, truncated=False, seconds=1.0, peak_bytes=7, prompt="", output="")
    return {"task": task, "plan": plan, "seed": 0, "id": str(id), "kind": "", "level": 0, "score": score} | figures | size | more


@pytest.fixture
def everything(tmp_path):
    """One source of every kind."""
    plans = {p: {"bytes": {n: n * b for n in (512, 1024)}, "windowed": 0.0, "note": ""} for p, b in (("bf16", 100), ("balanced", 11))}
    with RunFolder(tmp_path / "run", {"model": "models/tiny", "samples": None, "seeds": [0]}, {"plans": plans}) as run:
        run.append(record(p, "gsm8k", i, float(p == "bf16" or i > 30)) for p in plans for i in range(60))
        run.append(
            record(p, "needle", f"{d}-{n}", float(n == 512), kind=d, level=n) for p in plans for d in ("0%", "50%") for n in (512, 1024)
        )
        shared = dict(task="fidelity", seed=0, kind="", level=64, context=64, window=0, tokens=4)
        for p, kl in (("bf16", 0.0), ("balanced", 0.01)):
            ends = {f"{k}{e}": 0.9 for k in ("top1", "perplexity") for e in ("", "_low", "_high")}
            run.append([shared | ends | {"plan": p, "id": "64-0", "bits_per_element": 2.5, "token_kl": [kl] * 4}])
    files = {
        "sparse": [dict(scores=s, sparsity=x, bytes_saved=x / 2, n=9, accuracy=1 - x, low=0.0, high=1.0, mean_output_tokens=7)
                   for s in ("rlkv", "random <i>") for x in (0.2, 0.5)],
        "clips": [dict(plan=p, kind=k, n=9, accuracy=0.9, low=0.8, high=1.0, bits_per_element=b)
                  for p, b in (("bf16", 16.0), ("balanced", 1.7)) for k in ("all", "motion")],
        "decode": [dict(plan="balanced", backend="cuda", model="M", batch=8, context=c, us=5.0, best_bf16_us=9.0, speedup=1.8)
                   for c in (1024, 2048)] + [dict(plan="balanced", backend="cuda", model="M", batch=8, context=1, us=5.0, best_bf16_us=None, speedup=None)],
        "whole": [dict(point=f"{p} {b}", model="L", plan=p, batch=b, context=8192, ms_per_step=m, ms_low=m, ms_high=m, tokens_per_s=1e3 * b / m)
                  for p, b, m in (("bf16", 1, 8.0), ("balanced", 1, 4.0), ("bf16", 8, 9.0), *((f"vidkv-{i}", 8, 1.0 + i) for i in range(8)))]
                  + [dict(point="none", model="L", plan="balanced", batch=8, context=8192, error="OutOfMemoryError: none")],
        "unheard-of": [dict(colour="green", weight=3, nested=[1])],
    }  # fmt: skip
    for name, rows in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"gpu": "H100", "rows": rows}))
    bh.HeadScores(np.arange(8).reshape(2, 4) / 8, method="planted").save(tmp_path / "heads.tsv")
    return [tmp_path / "run", *(tmp_path / f"{n}.json" for n in files), tmp_path / "heads.tsv"]


def test_one_page_from_everything(everything, tmp_path):
    done = CliRunner().invoke(app, ["report", *map(str, everything), "-o", str(tmp_path / "out.html"), "--title", "A & B"])
    assert done.exit_code == 0, done.exception
    text = (tmp_path / "out.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert all(link.startswith("#") for link in checker.links)  # nothing is fetched
    assert not re.search(r"https?://|@import|url\(", text)
    assert "<i>" not in text and "random &lt;i&gt;" in text
    said = " ".join(checker.texts)
    for part in (
        "A & B",
        "tiny, gsm8k",
        "worse",
        "McNemar p",
        "48.3%",
        "heads kept at sparsity 0.5",
        "M, batch 8",
        "unheard-of",
        "green",
        "planted",
    ):
        assert part in said, part
    assert {s.removeprefix("#") for s in checker.links} == {
        "answers", "fidelity", "needles", "sparsity", "video", "memory", "heads", "speed", "steps", "results", "runs",
    }  # fmt: skip


def test_what_the_sections_hold(everything):
    found = {s.name: s for s in content.sections(read(everything))}
    pareto_chart, lengths, *_ = found["answers"].figures
    assert pareto_chart.front == ((0.0004, 29 / 60), (0.0032, 1.0))
    assert [p.label for s in pareto_chart.series for p in s.points] == ["bf16", "balanced"]
    assert [b.name for b in lengths.bars] == ["bf16", "balanced"]
    (table,) = found["answers"].tables
    row = dict(zip(table.columns, table.rows[1], strict=True))
    assert (row["plan"], row["n"], row["bits"], row["verdict"]) == ("balanced", 60, 2.0, "worse")
    assert found["needles"].figures[0].values == ((1.0, 0.0), (1.0, 0.0))
    assert [p.y for s in found["memory"].figures[0].series for p in s.points] == [0.0512, 0.1024, 0.005632, 0.011264]
    (heads,) = found["heads"].figures
    assert heads.marked == ((False,) * 4, (True,) * 4)
    lines = found["sparsity"].figures[0].series
    assert [[(p.x, p.y) for p in s.points] for s in lines] == [[(0.2, 0.8), (0.5, 0.5)]] * 2
    assert len(found["speed"].figures[0].series[0].points) == 2 and len(found["speed"].tables[0].rows) == 3


def test_needles_of_one_length_share_a_grid(tmp_path):
    with RunFolder(tmp_path / "run", {"model": "m", "samples": None}, {}) as run:
        run.append(
            record(p, "needle", f"{d}-{i}", float(p == "bf16" or i), kind=d, level=512)
            for p in ("bf16", "balanced")
            for d in ("50%", "0%")
            for i in range(2)
        )
    ((grid,),) = (s.figures for s in content.sections(read([tmp_path / "run"])) if s.name == "needles")
    assert (grid.rows, grid.columns, grid.values) == (("bf16", "balanced"), ("0%", "50%"), ((1.0, 1.0), (0.5, 0.5)))


def test_steps_of_whole_models(everything):
    """Plans of several places side by side, places with many plans as bars, a table for each model; what does not fit has its reason."""
    (section,) = (s for s in content.sections(read(everything)) if s.name == "steps")
    times, bars = section.figures
    assert (times.rows, times.columns) == (("batch 1, 8k", "batch 8, 8k"), ("bf16", "balanced"))
    assert times.values == ((1.0, 2.0), (1.0, None))
    assert [b.name for b in bars.bars] == [*(f"vidkv-{i}" for i in range(8)), "bf16"]
    (table,) = section.tables
    rows = {(r["plan"], r["batch"]): r for r in (dict(zip(table.columns, row, strict=True)) for row in table.rows)}
    assert len(rows) == 12 and rows["balanced", 1]["times bf16"] == 2.0 and rows["vidkv-2", 8]["tokens/s"] == pytest.approx(8e3 / 3)
    assert rows["balanced", 8]["ms per step"] is None and rows["balanced", 8]["note"].startswith("OutOfMemory")
    long = replace(times, columns=("bf16", "balanced with a long name+another plan"))
    texts = [e.text for e in ElementTree.fromstring(svg.draw(long)).iter("text")]
    assert "1" in texts and {"bf16", "name+", "another"} <= set(texts)


def test_runs_that_differ_in_their_plans_are_one(tmp_path):
    for name, plan in (("a", "bf16"), ("b", "balanced"), ("c", "balanced")):
        config = {"model": "m", "samples": 3 if name == "c" else 4, "plans": {plan: "digest"}}
        with RunFolder(tmp_path / name, config, {"plans": {plan: {"bytes": {"512": 1}}}}) as run:
            run.append(record(p, "t", i, 1.0) for p in {plan, "bf16"} for i in range(4))
    found = read([tmp_path / n for n in "abc"]).runs
    assert [(r.name, len(r.records)) for r in found] == [("a, b", 8), ("c", 8)]
    assert set(found[0].about["facts"]["plans"]) == {"bf16", "balanced"}


def test_plots_as_files(everything, tmp_path):
    sources = [p for p in everything if p.stem in ("clips", "heads")]
    done = CliRunner().invoke(app, ["report", *map(str, sources), "-o", str(tmp_path / "out.html"), "--plots", str(tmp_path / "plots")])
    assert done.exit_code == 0, done.exception
    figures = sum(len(s.figures) for s in content.sections(read(sources)))
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        files = sorted((tmp_path / "plots").glob(f"*.{suffix}"))
        assert len(files) == figures and all(f.read_bytes().startswith(start) for f in files)


def test_what_a_report_refuses(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("{")
    for given_paths, message in (
        ([], "needs run folders"),
        ([tmp_path / "empty"], "no run folder"),
        ([tmp_path / "none"], "no run folder"),
        ([tmp_path / "a.json"], 'has no "rows"'),
        ([tmp_path / "b.json"], "no JSON"),
    ):
        with pytest.raises(ReportError, match=message):
            read(given_paths)


def test_cells_sort_by_their_values():
    table = Table("t", "", ("plan", "share"), (("a", 0.5), ("b", None)), {"share": ".0%"})
    text = page.page("t", [Section("s", "S", "", (), (table,))])
    assert '<td class="number" data-sort="0.5">50%</td>' in text and "<td></td>" in text
