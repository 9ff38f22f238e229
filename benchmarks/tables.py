"""Write the tables of the documents from the files in benchmarks/results. Run after a benchmark: python benchmarks/tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->` in README.md or a document.
"""

import csv
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def presets() -> list[str]:
    data = json.loads((RESULTS / "presets-smollm2.json").read_text())
    rows = [r for r in data["summary"] if r["context"] == 2048]
    lines = [
        "| plan | bits | with everything at 32k | KL over `kivi-2`'s [95%] | tokens |",
        "|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: r["kl_over_kivi2"]):
        span = f"{r['kl_over_kivi2']:.2f} [{r['kl_over_kivi2_low']:.2f}, {r['kl_over_kivi2_high']:.2f}]"
        bits = f"{r['bits_per_element_without_residual']:.2f} | {r['bits_per_element_at_32k']:.2f}"
        lines.append(f"| `{r['plan']}` | {bits} | {span} | {r['tokens']} |")
    return lines


def presets_by_length() -> list[str]:
    data = json.loads((RESULTS / "presets-smollm2.json").read_text())
    contexts = sorted({r["context"] for r in data["summary"]})
    lines = [
        "| plan | " + " | ".join(f"{c} tokens: bits, KL over `kivi-2`'s [95%]" for c in contexts) + " |",
        "|---" * (len(contexts) + 1) + "|",
    ]
    by_plan: dict[str, dict[int, dict]] = {}
    for r in data["summary"]:
        by_plan.setdefault(r["plan"], {})[r["context"]] = r
    for plan, rows in by_plan.items():
        if len(rows) == len(contexts):
            cells = [
                f"{r['bits_per_element_without_residual']:.2f}, {r['kl_over_kivi2']:.2f} "
                f"[{r['kl_over_kivi2_low']:.2f}, {r['kl_over_kivi2_high']:.2f}]"
                for r in (rows[c] for c in contexts)
            ]
            lines.append(f"| `{plan}` | " + " | ".join(cells) + " |")
    return lines


def decode() -> list[str]:
    data = json.loads((RESULTS / "decode-h100.json").read_text())
    rows = {(r["model"], r["batch"], r["context"], r["plan"], r["backend"]): r for r in data["rows"]}
    lines = [
        "| shape | batch | context | best bf16, us | `balanced`, us | times | `extreme`, us | times |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (model, batch, context, plan, backend), r in sorted(rows.items()):
        if (plan, backend) != ("balanced", "cuda"):
            continue
        other = rows.get((model, batch, context, "extreme", "cuda"))
        more = f"{other['us']:.1f} | {other['speedup']:.2f}" if other else "- | -"
        lines.append(f"| {model} | {batch} | {context} | {r['best_bf16_us']:.1f} | {r['us']:.1f} | {r['speedup']:.2f} | {more} |")
    return lines


def decode_qwen() -> list[str]:
    data = json.loads((RESULTS / "decode-h100.json").read_text())
    rows = {(r["batch"], r["context"], r["plan"], r["backend"]): r for r in data["rows"] if r["model"] == "Qwen2.5-VL-7B"}
    lines = [
        "| Qwen2.5-VL-7B | best bf16, us | CUDA `balanced` [low, high] | times | TB/s | CUDA `extreme` | half windowed | Triton `balanced` |",
        "|---" * 8 + "|",
    ]
    for batch, context in sorted({(b, c) for b, c, *_ in rows}):
        r = rows[batch, context, "balanced", "cuda"]
        others = [("extreme", "cuda"), ("balanced, half windowed", "cuda"), ("balanced", "triton")]
        cells = [f"{rows[batch, context, *o]['us']:.1f}" if (batch, context, *o) in rows else "-" for o in others]
        lines.append(
            f"| B{batch} {context // 1024}K | {r['best_bf16_us']:.1f} | {r['us']:.1f} [{r['us_low']:.1f}, {r['us_high']:.1f}] "
            f"| {r['speedup']:.2f} | {r['bytes'] / r['us'] / 1e6:.2f} | {' | '.join(cells)} |"
        )
    return lines


def packing() -> list[str]:
    """Packing alone, and all that follows the attention of a prompt, for one layer."""
    data = json.loads((RESULTS / "pack-h100.json").read_text())
    rows = [{"run": 1, "commit": data["commit"]} | r for r in data["rows"] if r["what"] in ("pack", "prompt")]
    lines = ["| | plan | backend | commit | us [low, high] | |", "|---" * 6 + "|"]
    for r in sorted(rows, key=lambda r: (r["what"], r["plan"], r["backend"], -r["run"])):
        more = f"{r['ratio']:.1f} times one read" if "ratio" in r else f"{r['clock_us']:,.0f} by the clock"
        us = f"{r['us']:,.0f} [{r['us_low']:,.0f}, {r['us_high']:,.0f}]"
        lines.append(f"| {r['what']} | `{r['plan']}` | {r['backend']} | {r['commit'][:7]} | {us} | {more} |")
    return lines


PROMPT_PARTS = {
    "eigenvectors": r"principal_axes",
    "attention that tokens draw": r"query_sums|row_norms|key_mass",
    "packing keys and values": r"pack_tiles",
    "means and covariances": r"moments",
    "sums for the map back, map back": r"refit_sums|map_back",
    "heavy tokens, weights": r"^choose",
    "partial sums added": r"reduce_kernel",
    "all else": r"",
}


def packing_profile() -> list[str]:
    """Where the time of the prompt of one layer goes."""
    kernels = json.loads((RESULTS / "pack-h100.json").read_text())["profile"]["kernels"]
    lines = ["| part | us | launches |", "|---|---|---|"]
    for name, pattern in PROMPT_PARTS.items():
        own = [r for r in kernels if re.search(pattern, r["kernel"])]
        kernels = [r for r in kernels if r not in own]
        lines.append(f"| {name} | {sum(r['us'] for r in own):,.0f} | {sum(r['launches'] for r in own)} |")
    return lines


def _points(r: dict) -> str:
    """A paired difference and its 95% interval in points; "-" for the base itself."""
    if r["difference"] is None:
        return "-"
    return f"{100 * r['difference']:+.1f} [{100 * r['difference_low']:+.1f}, {100 * r['difference_high']:+.1f}]"


def video_tiny(group: str) -> list[str]:
    """Accuracy by kind of question; the rows of one group ("setting", "ablation" or "heads"), the most accurate first."""
    data = json.loads((RESULTS / "video-tiny.json").read_text())
    found: dict[str, dict[str, dict]] = {}
    for r in data["rows"]:
        if r["group"] == group:
            found.setdefault(r["plan"], {})[r["kind"]] = r
    kinds = sorted({r["kind"] for r in data["rows"]} - {"all"})
    names = ["plan", "bits here", "at 32k", "all [95%]", *kinds, "minus bf16 [95%]", "minus balanced [95%]"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for plan, rows in sorted(found.items(), key=lambda item: -item[1]["all"]["accuracy"]):
        r = rows["all"]
        name = plan if group == "ablation" else f"`{plan}`"
        cells = [name + " (CPU)" * (r["dtype"] == "torch.float32"), f"{r['bits_per_element']:.2f}", f"{r['bits_per_element_at_32k']:.2f}"]
        cells += [f"{100 * r['accuracy']:.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"]
        cells += [*(f"{100 * rows[k]['accuracy']:.1f}" for k in kinds), _points(r), _points(r["versus_balanced"])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def video_longest() -> list[str]:
    """The longest clip that is held, and what decoding over it takes."""
    rows = [r for r in json.loads((RESULTS / "video-longest-h100.json").read_text())["rows"] if r["what"] == "held"]
    lines = ["| plan | frames | does not fit | predicted | tokens | cache | bits | one token |", "|---" * 8 + "|"]
    for r in rows:
        cells = [f"`{r['plan']}`", f"{r['frames']:,}", f"{r['too_long']:,}" if r["too_long"] else "-", f"{r['predicted_frames']:,}"]
        cells += [f"{r['tokens']:,}", f"{r['cache_bytes'] / 1e9:.1f} GB", f"{r['bits_per_element']:.2f}", f"{r['token_ms']:.0f} ms"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cells(keep: Callable[[dict], bool]) -> list[dict]:
    """Rows of the tiny reasoner; of a cell that both engines ran the row of the cache."""
    found: dict[str, dict] = {}
    for r in json.loads((RESULTS / "heads-tiny-reasoner.json").read_text())["rows"]:
        if keep(r) and (r["plan"] not in found or r["engine"] == "cache"):
            found[r["plan"]] = r
    return sorted(found.values(), key=lambda r: (r["scores"] != "all heads", r["scores"], r["bits"], r["window"], r["sparsity"]))


def _reasoner(keep: Callable[[dict], bool], columns: list[tuple[str, Callable[[dict], str]]]) -> list[str]:
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|---" * len(columns) + "|"]
    return lines + ["| " + " | ".join(cell(r) for _, cell in columns) + " |" for r in _cells(keep)]


def _by_sparsity(keep: Callable[[dict], bool], part: str = "") -> list[str]:
    """Accuracy, a column for each sparsity; bold where it is not worse than with all heads. part: "long_" counts the long problems only."""
    rows = [r for r in _cells(lambda r: keep(r) and r["scores"] != "all heads")]
    sparsities = sorted({r["sparsity"] for r in rows})
    lines = ["| scores or method | " + " | ".join(f"s = {s:g}" for s in sparsities) + " |", "|---" * (len(sparsities) + 1) + "|"]
    for name, window in dict.fromkeys((r["scores"], r["window"]) for r in rows):
        own = {r["sparsity"]: r for r in rows if (r["scores"], r["window"]) == (name, window)}
        cells = []
        for r in (own.get(s) for s in sparsities):
            if r is None:
                cells.append("-")
                continue
            accuracy, low, high = (r[part + k] for k in ("accuracy", "low", "high"))
            mark = "" if r[part + "verdict"] == "worse" else "**"
            cells.append(f"{mark}{accuracy:.3f}{mark} [{low:.3f}, {high:.3f}]")
        lines.append(f"| {name}{'' if window == '32+128' else ', ' + window} | " + " | ".join(cells) + " |")
    return lines


def _plain(r: dict) -> bool:
    return r["bits"] == "bf16"


def _seed(r: dict) -> bool:
    return r["scores"].removeprefix("rlkv-").removeprefix("mean-").isdecimal()


def _ablation(r: dict) -> bool:
    return r["scores"].startswith("rlkv") or r["window"] != "32+128"


def gates_cost() -> list[str]:
    """What each training run of the gates took, and where it ended."""
    lines = [
        "| run | steps | minutes | tokens generated | tokens/s | share in rollouts | peak GB | reward, last 5 steps | gates above 0.1 | at 0 |",
        "|---" * 10 + "|",
    ]
    for path in sorted((RESULTS / "gates").glob("rlkv-*.json")):
        r = json.loads(path.read_text())
        with path.with_suffix(".csv").open(newline="") as file:
            log = list(csv.DictReader(file))
        gates = [float(v) for k, v in log[-1].items() if k.startswith("gate_")]
        reward = sum(float(row["reward"]) for row in log[-5:]) / len(log[-5:])
        cells = [
            path.stem,
            str(r["steps"]),
            f"{r['seconds'] / 60:.1f}",
            f"{r['tokens_generated']:,}",
            f"{r['tokens_per_second_of_rollout']:,.0f}",
        ]
        cells += [f"{r['rollout_share']:.0%}", f"{r['peak_memory_bytes'] / 1e9:.1f}", f"{reward:.3f}"]
        lines.append("| " + " | ".join([*cells, str(sum(g > 0.1 for g in gates)), str(gates.count(0))]) + " |")
    return lines


REASONER: list[tuple[str, Callable[[dict], str]]] = [
    ("scores or method", lambda r: r["scores"]),
    ("sparsity", lambda r: f"{r['sparsity']:g}"),
    ("bytes saved", lambda r: f"{r['bytes_saved']:.0%}"),
    ("accuracy [95%]", lambda r: f"{r['accuracy']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"),
    ("of the long ones", lambda r: f"{r['long_accuracy']:.3f}"),
    ("output tokens", lambda r: f"{r['mean_output_tokens']:.0f}"),
    ("repetition", lambda r: f"{r['repetition']:.3f}"),
    ("cut off", lambda r: f"{r['truncated']:.3f}"),
]


def heads_reasoner(part: str = "") -> list[str]:
    return _by_sparsity(lambda r: _plain(r) and r["window"] == "32+128" and (not _ablation(r) or _seed(r)), part)


def heads_ablations() -> list[str]:
    return _by_sparsity(lambda r: _plain(r) and _ablation(r), "long_")


def heads_cells() -> list[str]:
    columns = [*REASONER[:2], ("window", lambda r: r["window"]), *REASONER[2:]]
    return _reasoner(_plain, [*columns, ("run by", lambda r: r["engine"])])


def heads_compose() -> list[str]:
    packed = ("packed", lambda r: f"{r['packed_share']:.0%}")
    bits = ("bits", lambda r: f"`{r['bits']}`")
    return _reasoner(lambda r: r["bits"] != "bf16", [bits, *REASONER[:3], packed, *REASONER[3:]])


def heads_exact() -> list[str]:
    rows = json.loads((RESULTS / "heads-exact.json").read_text())["rows"]
    sparsities = sorted({r["sparsity"] for r in rows if r["sparsity"]})
    head = [f"scores ({rows[0]['n']} problems)", *(f"s = {s:g}" for s in sparsities)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in dict.fromkeys(r["scores"] for r in rows if r["sparsity"]):
        own = {r["sparsity"]: r for r in rows if r["scores"] == name}
        cells = [f"{own[s]['unchanged']:.2f} [{own[s]['low']:.2f}, {own[s]['high']:.2f}]" if s in own else "-" for s in sparsities]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def heads_memory() -> list[str]:
    lines = ["| plan | MiB by the allocator | by the plan | times smaller than bf16 |", "|---" * 4 + "|"]
    for r in json.loads((RESULTS / "heads-memory.json").read_text())["rows"]:
        lines.append(f"| `{r['plan']}` | {r['allocator_bytes'] / 2**20:.1f} | {r['plan_bytes'] / 2**20:.1f} | {r['times_smaller']:.1f} |")
    return lines


def heads_smollm2() -> list[str]:
    lines = [
        "| scores | sparsity | bytes saved at 1k tokens | KL of long text [95%] | top-1 | needles found [95%] |",
        "|---" * 6 + "|",
    ]
    rows = json.loads((RESULTS / "heads-smollm2.json").read_text())["rows"]
    for r in sorted(rows, key=lambda r: (r["scores"] != "all heads", r["scores"], r["sparsity"])):
        kl = f"{r['kl']:.3f} [{r['kl_low']:.3f}, {r['kl_high']:.3f}] | {r['top1']:.3f}" if r["kl"] is not None else "- | -"
        found = f"{r['needles']:.2f} [{r['needles_low']:.2f}, {r['needles_high']:.2f}]" if r["needles"] is not None else "-"
        lines.append(f"| {r['scores']} | {r['sparsity']:g} | {r['bytes_saved']:.0%} | {kl} | {found} |")
    return lines


def _or_dash(value: float | None, unit: float, places: int) -> str:
    return "-" if value is None else f"{value / unit:.{places}f}"


def _generate_place(r: dict) -> tuple:
    return r["model"], r["context"], r.get("largest", False), 0 if r.get("largest") else r["batch"], r.get("tuned", False)


def _generate_rows(keep: Callable[[dict], bool]) -> list[tuple[dict, dict]]:
    """Rows of decode steps, each with the row of `bf16` at its place ({}: none), in the order of places, the fastest first."""
    rows = json.loads((RESULTS / "generate-h100.json").read_text())["rows"]
    base = {_generate_place(r): r for r in rows if r["plan"] == "bf16" and "error" not in r}
    order = sorted(filter(keep, rows), key=lambda r: (_generate_place(r), -r.get("tokens_per_s", 0)))
    return [(r, base.get(_generate_place(r), {})) for r in order]


def generate(keep: Callable[[dict], bool] = lambda r: True) -> list[str]:
    lines = ["| model | context | batch | plan | ms per step | tokens/s | times `bf16` | cache, GB | peak, GB |", "|---" * 9 + "|"]
    for r, base in _generate_rows(keep):
        batch = f"{r['batch']}{' (largest)' if r.get('largest') else ' (tuned)' if r.get('tuned') else ''}"
        start = f"| {r['model']} | {r['context']:,} | {batch} | `{r['plan']}` |"
        if "error" in r:
            lines.append(f"{start} {'does not fit' if 'OutOfMemory' in r['error'] else r['error'].split(':')[0]} | | | | |")
            continue
        times = f"{r['tokens_per_s'] / base['tokens_per_s']:.2f}" if base else "-"
        size = f"{_or_dash(r.get('cache_bytes'), 1e9, 2)} | {_or_dash(r.get('peak_bytes'), 1e9, 1)}"
        lines.append(f"{start} {r['ms_per_step']:.2f} | {r['tokens_per_s']:,.0f} | {times} | {size} |")
    return lines


def _is_target(r: dict) -> bool:
    """The places that docs/generate.md has targets for."""
    ours = r["plan"] in ("balanced", "bf16", "rlkv@0.5", "balanced+rlkv@0.5") or r["plan"].startswith("hf-")
    places = {(8, 32768), (1, 8192), (1, 131072)}
    return r["model"] == "qwen2.5-7b" and ours and ("largest" in r or (r["batch"], r["context"]) in places)


def generate_longest() -> list[str]:
    """The longest context of one sequence beside a model."""
    rows = json.loads((RESULTS / "generate-h100.json").read_text())["longest"]
    base = {r["model"]: r["context"] for r in rows if r["plan"] == "bf16"}
    lines = ["| model | plan | tokens that fit | cache, GB | times `bf16` |", "|---" * 5 + "|"]
    for r in sorted(rows, key=lambda r: (r["model"], -r["context"])):
        lines.append(
            f"| {r['model']} | `{r['plan']}` | {r['context']:,} | {r['cache_bytes'] / 1e9:.1f} | {r['context'] / base[r['model']]:.2f} |"
        )
    return lines


STEP_PARTS = {
    "linear layers, head of the vocabulary included": r"nvjet|splitK|gemm|cutlass|_mm_|triton_tem",
    "attention (two launches, which overlap)": r"^attend|^merge",
    "append": r"append",
    "packing of full tiles": r"pack",
    "norms, rotary embedding, activations": r"^triton",
    "choice of the token, copies": r"",
}


def generate_profile() -> list[str]:
    """Where a step's time goes: kernels by part, gaps, and what is left of the step as it was timed without the profiler."""
    data = json.loads((RESULTS / "generate-h100.json").read_text())
    ms = {
        (r["plan"], r["batch"], r["context"]): r["ms_per_step"]
        for r in data["rows"]
        if "largest" not in r and "tuned" not in r and "error" not in r and r["model"] == "qwen2.5-7b"
    }
    profiles = [r for r in data.get("profiles", []) if "error" not in r]
    cells: dict[str, list[str]] = {name: [] for name in (*STEP_PARTS, "between two kernels", "waiting for the host", "the step")}
    for r in profiles:
        parts = dict.fromkeys(STEP_PARTS, (0.0, 0.0))
        for k in r["kernels"]:
            name = next(n for n, pattern in STEP_PARTS.items() if re.search(pattern, k["kernel"]))
            parts[name] = parts[name][0] + k["us"], parts[name][1] + k["launches"]
        for name, (us, launches) in parts.items():
            cells[name].append(f"{us / 1e3:.2f} ({launches:.0f})")
        step = ms[r["plan"], r["batch"], r["context"]]
        cells["between two kernels"].append(f"{r['between_us'] / 1e3:.2f}")
        cells["waiting for the host"].append(f"{step - (r['busy_us'] + r['between_us']) / 1e3:.2f}")
        cells["the step"].append(f"{step:.2f}")
    heads = [f"`{r['plan']}` B{r['batch']} {r['context'] // 1024}K" for r in profiles]
    lines = ["| ms (launches) | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    return lines + [f"| {name} | " + " | ".join(own) + " |" for name, own in cells.items()]


def generate_prompts() -> list[str]:
    """Whole prompts of one sequence."""
    rows = json.loads((RESULTS / "generate-h100.json").read_text())["prefill"]
    lines = [
        "| model | prompt | in passes of | plan | seconds [low, high] | peak above the weights, GB | held afterwards, GB |",
        "|---" * 7 + "|",
    ]
    for r in sorted(
        (r for r in rows if "error" not in r), key=lambda r: (r["model"], r["context"], -(r["chunk"] or r["context"]), r["plan"])
    ):
        seconds = f"{r['prefill_s']:.3f} [{r['prefill_low']:.3f}, {r['prefill_high']:.3f}]"
        lines.append(
            f"| {r['model']} | {r['context']:,} | {r['chunk'] or r['context']:,} | `{r['plan']}` | {seconds} "
            f"| {(r['peak_bytes'] - r['model_bytes']) / 1e9:.2f} | {r['held_bytes'] / 1e9:.2f} |"
        )
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "presets": presets,
    "presets-by-length": presets_by_length,
    "decode": decode,
    "decode-qwen": decode_qwen,
    "packing": packing,
    "packing-profile": packing_profile,
    "generate": generate,
    "generate-targets": partial(generate, _is_target),
    "generate-longest": generate_longest,
    "generate-prompts": generate_prompts,
    "generate-profile": generate_profile,
    "heads-reasoner": heads_reasoner,
    "heads-reasoner-long": partial(heads_reasoner, "long_"),
    "heads-ablations": heads_ablations,
    "heads-cells": heads_cells,
    "gates-cost": gates_cost,
    "heads-compose": heads_compose,
    "heads-exact": heads_exact,
    "heads-memory": heads_memory,
    "heads-smollm": heads_smollm2,
    "video-longest": video_longest,
    "video-tiny": partial(video_tiny, "setting"),
    "video-tiny-ablations": partial(video_tiny, "ablation"),
    "video-tiny-heads": partial(video_tiny, "heads"),
}


def main() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text()

        def fill(match: re.Match[str]) -> str:
            return "\n".join([match[1], *TABLES[match[2]](), "<!-- end -->"])

        new = re.sub(r"(<!-- table: ([a-z-]+) -->).*?<!-- end -->", fill, text, flags=re.S)
        if new != text:
            path.write_text(new)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
