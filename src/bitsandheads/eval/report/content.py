"""What a report says: sections of figures and tables, from what was read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..fidelity import TASK as FIDELITY
from ..summary import BASE, grouped, summarise
from .figures import Axis, Bar, Bars, Chart, Figure, Grid, Point, Section, Series, Table, number, pareto
from .sources import File, Run, Sources

Row = Mapping[str, Any]
FAMILIES = ("full precision", "KIVI", "VidKV", "transform coding", "fewer heads", "both at once", "transformers' own")
KEPT = 0.5  # share of the heads that maps mark
NEEDLE = "needle"
MANY = 8  # plans of one place that get bars of their own
LONGEST = 80  # letters of a text in a table of plain results


def family(plan: str) -> int:
    """Index of the plan's family in FAMILIES, and its colour."""
    if "rlkv" in plan:
        return 5 if "+rlkv" in plan else 4
    starts = {BASE: 0, "kivi": 1, "vidkv": 2, "hf-": 6}
    return next((i for start, i in starts.items() if plan.startswith(start)), 3)


def percent(value: float) -> str:
    """0.1234 -> "12.3%"."""
    return f"{100 * value:.1f}%"


def span(low: float, high: float, form: str = ".1f") -> str:
    """0.1234, 0.5 -> "12.3 to 50.0%"."""
    return f"{100 * low:{form}} to {100 * high:{form}}%"


def by_family(rows: Iterable[Row], point: Callable[[Row], Point]) -> tuple[Series, ...]:
    """The rows' points, a series for each family of plans."""
    found: dict[int, list[Point]] = {}
    for r in rows:
        found.setdefault(family(r["plan"]), []).append(point(r))
    return tuple(Series(FAMILIES[i], tuple(found[i]), i) for i in sorted(found))


def sections(sources: Sources) -> list[Section]:
    """All sections that have something to show, in the order of the page."""
    makers = (answers, fidelity, needles, sparsity, video, memory, head_maps, speed, steps, other, runs)
    return [s for s in (make(sources) for make in makers) if s.figures or s.tables]


# -- answers ------------------------------------------------------------------------------------------------------------------


def _answers(run: Run) -> list[dict[str, Any]]:
    return summarise(r for r in run.records if r["task"] != FIDELITY)


def _front_chart(title: str, rows: Sequence[Row], x: Axis, y: Axis, x_of: Callable[[Row], float], y_name: str, better: int) -> Chart:
    """Plans as points over bytes, those on the front with their names. y_name: field with y_name_low, y_name_high or low, high."""
    low, high = ("low", "high") if "low" in rows[0] else (f"{y_name}_low", f"{y_name}_high")
    front = pareto([(x_of(r), r[y_name]) for r in rows], better)

    def point(r: Row) -> Point:
        at = x_of(r), r[y_name]
        tip = f"{r['plan']}: {y.text(y.shown(at[1]))} ({y.text(y.shown(r[low]))} to {y.text(y.shown(r[high]))}), {r['bits_per_element']:.2f} bits"
        return Point(at[0], at[1], r[low], r[high], tip, r["plan"] if at in front else "")

    return Chart(title, "Bars: 95% intervals. Dashed: the best that is had for so many bytes.", x, y, by_family(rows, point), front)


def answers(sources: Sources) -> Section:
    """Accuracy against bytes, output length and repetition of every task; the table of all plans."""
    figures: list[Figure] = []
    rows: list[tuple] = []
    for run in sources.runs:
        for (task,), of_task in grouped(_answers(run), ["task"]).items():
            where = f"{run.title}, {task}"
            x = Axis("KV cache at the end, MB (mean)", log=True)
            figures.append(
                _front_chart(where, of_task, x, Axis("accuracy", percent=True), lambda r: r["mean_cache_bytes"] / 1e6, "accuracy", 1)
            )
            figures.append(_lengths(where, of_task))
            rows += [_answer_cells(run, r) for r in of_task]
    columns = (
        "model",
        "task",
        "plan",
        "bits",
        "MB",
        "n",
        "accuracy",
        "95%",
        f"less {BASE}",
        "its 95%",
        "McNemar p",
        "verdict",
        "tokens",
        "repeated",
        "cut off",
    )
    formats = {"bits": ".2f", "MB": ".3f", "accuracy": ".1%", f"less {BASE}": "+.1%", "McNemar p": ".3g", "tokens": ".0f"}
    formats |= {"repeated": ".1%", "cut off": ".1%"}
    note = (
        "Pass@1 over the seeds. MB: mean bytes of the KV cache for a sample's own tokens at its end. Intervals of accuracy are Wilson's, those of "
        f"differences to {BASE} come from a paired bootstrap over the same samples; a difference whose interval holds zero, or with p of at least .05, "
        "is called inside the noise. Repeated: share of 16-token sequences that stood before in the same output."
    )
    tables = (Table("Answers", note, columns, tuple(rows), formats),) if rows else ()
    return Section(
        "answers",
        "Accuracy against true bytes",
        "Every byte that a cache holds is counted: codes, scales, rotations, whole tokens.",
        tuple(figures),
        tables,
    )


def _lengths(where: str, rows: Sequence[Row]) -> Bars:
    def bar(r: Row) -> Bar:
        tip = f"{r['plan']}: {r['mean_output_tokens']:.0f} tokens, {percent(r['repetition'])} repeated, {percent(r['truncated'])} cut off"
        return Bar(r["plan"], r["mean_output_tokens"], family(r["plan"]), tip=tip)

    return Bars(
        f"Output length: {where}", "Compression that fails lets a model talk on.", Axis("mean output tokens"), tuple(map(bar, rows))
    )


def _answer_cells(run: Run, r: Row) -> tuple:
    against = "" if r["difference"] is None else span(r["difference_low"], r["difference_high"], "+.1f")
    size = (r["bits_per_element"], r["mean_cache_bytes"] / 1e6, r["n"])
    test = (r["difference"], against, r["p"], r["verdict"] or "")
    habits = (r["mean_output_tokens"], r["repetition"], r["truncated"])
    return (run.model, r["task"], r["plan"], *size, r["accuracy"], span(r["low"], r["high"]), *test, *habits)


# -- fidelity -----------------------------------------------------------------------------------------------------------------


def fidelity(sources: Sources) -> Section:
    """KL against bits for each context; the table."""
    figures: list[Figure] = []
    cells: list[tuple] = []
    for file in sources.fidelity:
        model = str(file.about.get("model", file.name))
        for (context,), rows in grouped(file.rows, ["context"]).items():
            lossy = [r for r in rows if r["plan"] != BASE and r["kl"] > 0]
            if lossy:
                x, y = Axis("bits for each cached element", log=True), Axis("KL to full precision", log=True)
                title = f"{model}, {context} tokens of context"
                figures.append(_front_chart(title, lossy, x, y, lambda r: r["bits_per_element"], "kl", -1))
            for r in rows:
                span = f"{r['kl_low']:.4f} to {r['kl_high']:.4f}"
                cells.append(
                    (
                        model,
                        context,
                        r["plan"],
                        r["bits_per_element"],
                        r.get("bits_per_element_at_32k"),
                        r["kl"],
                        span,
                        r["top1"],
                        r["perplexity"],
                        r["tokens"],
                    )
                )
    columns = ("model", "context", "plan", "bits", "bits at 32k", "KL", "95%", "top-1", "perplexity", "tokens")
    formats = {"bits": ".2f", "bits at 32k": ".2f", "KL": ".4f", "top-1": ".1%", "perplexity": ".2f", "context": "d"}
    note = "Teacher-forced text through the real cache. KL and top-1 compare the next-token distribution with full precision's; block-bootstrap intervals."
    tables = (Table("Fidelity on long text", "", columns, tuple(cells), formats),) if cells else ()
    return Section("fidelity", "Fidelity on long text", note, tuple(figures), tables)


# -- needles ------------------------------------------------------------------------------------------------------------------


def needles(sources: Sources) -> Section:
    """For every plan a grid of accuracy by depth and length; one grid of all plans by depth where there is one length only."""
    figures: list[Figure] = []
    for run in sources.runs:
        records = [r for r in run.records if r["task"] == NEEDLE]
        cells = {k: sum(r["score"] for r in v) / len(v) for k, v in grouped(records, ["plan", "kind", "level"]).items()}
        depths = tuple(sorted({r["kind"] for r in records}, key=lambda d: float(d.rstrip("%"))))
        lengths = sorted({r["level"] for r in records})
        plans = tuple(dict.fromkeys(r["plan"] for r in records))
        if len(lengths) == 1:
            values = tuple(tuple(cells.get((p, d, lengths[0])) for d in depths) for p in plans)
            note = f"{len(records) // len(plans)} needles for each plan."
            figures.append(Grid(f"{run.title}, {lengths[0]} tokens", note, plans, depths, "", "depth", values, 0, 1, True))
            continue
        for plan in plans:
            scores = [r["score"] for r in records if r["plan"] == plan]
            values = tuple(tuple(cells.get((plan, d, n)) for n in lengths) for d in depths)
            note = f"{len(scores)} needles, {percent(sum(scores) / len(scores))} found."
            figures.append(Grid(f"{run.title}, {plan}", note, depths, tuple(map(str, lengths)), "depth", "tokens", values, 0, 1, True))
    return Section("needles", "Needle in a haystack", "A number hidden in a long text, asked for at its end.", tuple(figures))


# -- fewer heads --------------------------------------------------------------------------------------------------------------


def sparsity(sources: Sources) -> Section:
    """Accuracy by share of windowed heads and by true bytes saved, a line for each source of scores."""
    figures: list[Figure] = []
    tables: list[Table] = []
    for file in sources.sparsity:
        for key, rows in grouped([{"bits": "bf16", "window": "", **r} for r in file.rows], ["bits", "window"]).items():
            title = ", ".join([file.name, *(k for k in key if k)])
            for x_name, axis in (
                ("sparsity", Axis("share of windowed heads", percent=True)),
                ("bytes_saved", Axis("share of bytes saved", percent=True)),
            ):
                for y_name, y in (("accuracy", Axis("accuracy", percent=True)), ("mean_output_tokens", Axis("mean output tokens"))):
                    if y_name == "accuracy" or (x_name == "sparsity" and all(y_name in r for r in rows)):
                        figures.append(_sparsity_chart(title, rows, x_name, axis, y_name, y))
        tables.append(_plain_table(file))
    note = "Sparsity is the share of KV heads that keep only a window; what that saves in bytes depends on the length, sink and window counted."
    return Section("sparsity", "Accuracy by sparsity", note, tuple(figures), tuple(tables))


def _sparsity_chart(title: str, rows: Sequence[Row], x_name: str, x: Axis, y_name: str, y: Axis) -> Chart:
    series = []
    for i, ((name,), mine) in enumerate(grouped(rows, ["scores"]).items()):
        points = []
        for r in sorted(mine, key=lambda r: r[x_name]):
            tip = (
                f"{name}, {percent(r['sparsity'])} windowed, {percent(r['bytes_saved'])} saved: {y.text(y.shown(r[y_name]))}, n = {r['n']}"
            )
            low, high = (r["low"], r["high"]) if y_name == "accuracy" else (None, None)
            points.append(Point(r[x_name], r[y_name], low, high, tip))
        series.append(Series(str(name), tuple(points), i, line=True))
    return Chart(f"{title}: {y.name}", "Bars: 95% intervals." if y_name == "accuracy" else "", x, y, tuple(series))


# -- video --------------------------------------------------------------------------------------------------------------------


def video(sources: Sources) -> Section:
    """Accuracy against bits, and a grid of plans by kinds of question."""
    figures: list[Figure] = []
    tables: list[Table] = []
    for file in sources.video:
        total = [r for r in file.rows if r["kind"] == "all"]
        x, y = Axis("bits for each cached element"), Axis("accuracy", percent=True)
        if total:
            figures.append(_front_chart(file.name, total, x, y, lambda r: r["bits_per_element"], "accuracy", 1))
        kinds, plans = (tuple(dict.fromkeys(r[k] for r in file.rows)) for k in ("kind", "plan"))
        found = {(r["plan"], r["kind"]): r["accuracy"] for r in file.rows}
        values = tuple(tuple(found.get((p, k)) for k in kinds) for p in plans)
        low = min(found.values())
        figures.append(
            Grid(f"{file.name}, by kind of question", "", plans, kinds, "", "kind of question", values, low, max(1.0, low + 1e-9), True)
        )
        tables.append(_plain_table(file))
    return Section("video", "Video questions", "Accuracy on held-out clips.", tuple(figures), tuple(tables))


# -- memory, heads, speed -----------------------------------------------------------------------------------------------------


def memory(sources: Sources) -> Section:
    """Bytes of every plan by context, from the runs' facts."""
    figures: list[Figure] = []
    seen: set[str] = set()
    for run in sources.runs:
        plans = run.about.get("facts", {}).get("plans", {})
        if not plans or run.model in seen:
            continue
        seen.add(run.model)
        series = []
        for i, (plan, fact) in enumerate(plans.items()):
            tip = lambda n, b, plan=plan: f"{plan}, {n} tokens: {number(b / 1e6)} MB"  # noqa: E731
            points = tuple(Point(int(n), b / 1e6, tip=tip(n, b)) for n, b in fact["bytes"].items())
            series.append(Series(plan, points, i, line=True))
        note = "One sequence. By the plans' own arithmetic, which tests hold equal to the bytes of real caches."
        figures.append(Chart(run.model, note, Axis("tokens", log=True), Axis("KV cache, MB", log=True), tuple(series)))
    return Section("memory", "Memory by context", "", tuple(figures))


def head_maps(sources: Sources) -> Section:
    """Scores by layer and head, the best half framed."""
    figures: list[Figure] = []
    for name, scores in sources.scores:
        keep = scores.top(KEPT)
        marked = tuple(tuple(bool(k) for k in row) for row in keep)
        values = tuple(tuple(float(v) for v in row) for row in scores.values)
        low, high = float(scores.values.min()), float(scores.values.max())
        note = f"{scores.method or 'scores'}; from {number(low)} (pale) to {number(high)}. Framed: the heads kept at sparsity {KEPT:g}."
        layers, heads = tuple(map(str, scores.layers)), tuple(map(str, range(len(values[0]))))
        figures.append(Grid(name, note, layers, heads, "layer", "KV head", values, low, max(high, low + 1e-9), marked=marked))
    return Section("heads", "Head scores", "How much each KV head needs its whole past.", tuple(figures))


def speed(sources: Sources) -> Section:
    """Times as fast as the best full-precision attention, by context; all rows as a table."""
    figures: list[Figure] = []
    tables: list[Table] = []
    for file in sources.speed:
        for (model, batch), rows in grouped(file.rows, ["model", "batch"]).items():
            packed = [r for r in rows if r["plan"] != BASE and r["speedup"] is not None]
            series = []
            for i, ((plan, backend), mine) in enumerate(grouped(packed, ["plan", "backend"]).items()):
                points = []
                for r in sorted(mine, key=lambda r: r["context"]):
                    tip = f"{plan}, {backend}, {r['context']} tokens: {r['us']:.1f} us, best bf16 {r['best_bf16_us']:.1f} us, x {r['speedup']:.2f}"
                    points.append(Point(r["context"], r["speedup"], tip=tip))
                series.append(Series(f"{plan}, {backend}", tuple(points), i, line=True))
            if any(len(s.points) > 1 for s in series):
                y = Axis("times as fast as the best bf16", low=0.0)
                figures.append(Chart(f"{model}, batch {batch}", "", Axis("tokens of context", log=True), y, tuple(series)))
        tables.append(_plain_table(file))
    note = "; ".join(f"{k} {v}" for file in sources.speed for k, v in file.about.items() if k in ("gpu", "torch", "date", "commit"))
    return Section("speed", "Speed of decode attention", note, tuple(figures), tuple(tables))


def _place(r: Row) -> str:
    """Where plans are compared: batch and context; each plan's own largest batch; steps that were compiled with tuning."""
    batch = "largest batch" if r.get("largest") else f"batch {r['batch']}"
    return f"{batch}, {r['context'] / 1024:g}k{', tuned' if r.get('tuned') else ''}"


def _step_cells(r: Row, base: Row) -> tuple:
    """A row of the table of steps; base: full precision at the same place."""
    ms, rate = r.get("ms_per_step"), r.get("tokens_per_s")
    times = rate / base["tokens_per_s"] if rate and base.get("tokens_per_s") else None
    spread = f"{r['ms_low']:.2f} to {r['ms_high']:.2f}" if "ms_low" in r else ""
    note = "the largest batch that fits" if r.get("largest") else "tuned" if r.get("tuned") else r.get("error", "")
    sizes = (r[k] / 1e9 if r.get(k) is not None else None for k in ("cache_bytes", "peak_bytes"))
    return (r["context"], r["batch"], r["plan"], ms, spread, rate, times, *sizes, note)


def steps(sources: Sources) -> Section:
    """Decode steps of whole models: for each model how much faster than full precision, and a table of its own."""
    figures: list[Figure] = []
    tables: list[Table] = []
    columns = (
        "context",
        "batch",
        "plan",
        "ms per step",
        "fastest and slowest",
        "tokens/s",
        f"times {BASE}",
        "cache, GB",
        "peak, GB",
        "note",
    )
    formats = {"context": ",d", "ms per step": ".2f", "tokens/s": ",.0f", f"times {BASE}": ".2f", "cache, GB": ".2f", "peak, GB": ".1f"}
    for file in sources.steps:
        for (model,), rows in grouped(file.rows, ["model"]).items():
            rows = sorted(rows, key=lambda r: (r["context"], bool(r.get("largest")), r["batch"], bool(r.get("tuned"))))
            places = grouped([{**r, "place": _place(r)} for r in rows], ["place"])
            base = {place: next((r for r in own if r["plan"] == BASE), {}) for (place,), own in places.items()}
            cells = {(r["plan"], place): _step_cells(r, base[place]) for (place,), own in places.items() for r in own}
            times = {at: dict(zip(columns, row, strict=True))[f"times {BASE}"] for at, row in cells.items()}
            often = [p for p in dict.fromkeys(r["plan"] for r in rows) if 2 * sum(p == plan for plan, _ in times) > len(base)]
            values = tuple(tuple(times.get((p, place)) for p in often) for place in base)
            found = [v for row in values for v in row if v is not None]
            if len(found) > len(base):
                title = f"{model}: times as fast as {BASE}"
                figures.append(Grid(title, "", tuple(base), tuple(often), "", "", values, min(0.0, *found), max(found)))
            for (place,), own in places.items():
                timed = sorted((r for r in own if "tokens_per_s" in r), key=lambda r: -r["tokens_per_s"])
                if len(timed) > MANY:
                    tip = "{plan}: {tokens_per_s:,.0f} tokens/s, {ms_per_step:.2f} ms per step"
                    bars = (Bar(r["plan"], r["tokens_per_s"], family(r["plan"]), tip=tip.format_map(r)) for r in timed)
                    figures.append(Bars(f"{model}, {place}", "", Axis("tokens/s"), tuple(bars)))
            tables.append(Table(f"{model}, steps", "", columns, tuple(cells.values()), formats))
        for key, title in (("longest", "longest context of one sequence"), ("prefill", "whole prompts")):
            if file.about.get(key):
                tables.append(_plain_table(File(f"{file.name}, {title}", {}, file.about[key])))
    note = "; ".join(f"{k} {v}" for file in sources.steps for k, v in file.about.get("environment", {}).items())
    return Section("steps", "Speed of whole models", note, tuple(figures), tuple(tables))


# -- the rest -----------------------------------------------------------------------------------------------------------------


def _plain_table(file: File) -> Table:
    """All rows of a file with their simple fields; long texts are left out."""

    def simple(value: Any) -> bool:
        return value is None or isinstance(value, int | float) or (isinstance(value, str) and len(value) <= LONGEST)

    columns = tuple(k for k in dict.fromkeys(k for r in file.rows for k in r) if all(simple(r.get(k)) for r in file.rows))
    cells = tuple(tuple(r.get(c) for c in columns) for r in file.rows)
    return Table(file.name, "", tuple(c.replace("_", " ") for c in columns), cells)


def other(sources: Sources) -> Section:
    """Results of other kinds, as tables."""
    return Section("results", "Further results", "", (), tuple(_plain_table(f) for f in sources.other))


def runs(sources: Sources) -> Section:
    """What was run with what."""
    cells = []
    for run in sources.runs:
        config, versions = run.about["config"], run.about["versions"]
        settings = ", ".join(
            f"{k} {config[k]}" for k in ("samples", "seeds", "sampling", "chat", "max_new_tokens") if config.get(k) is not None
        )
        stack = ", ".join(f"{k} {v}" for k, v in versions.items() if k != "device")
        commit = (run.about.get("commit") or "")[:10]
        cells.append((run.name, run.model, len(run.records), settings, versions["device"], stack, commit, run.about["started"]))
    columns = ("run", "model", "records", "settings", "device", "versions", "commit", "started")
    return Section("runs", "Runs", "", (), (Table("What was run", "", columns, tuple(cells)),) if cells else ())
