"""Write the tables of the documents from the files in benchmarks/results. Run after a benchmark: python benchmarks/tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->` in README.md or a document.
"""

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


def video_tiny(group: str) -> list[str]:
    """Accuracy by kind of question; the rows of one group ("setting" or "ablation"), the most accurate first."""
    data = json.loads((RESULTS / "video-tiny.json").read_text())
    found: dict[str, dict[str, dict]] = {}
    for r in data["rows"]:
        if r["group"] == group:
            found.setdefault(r["plan"], {})[r["kind"]] = r
    kinds = sorted({r["kind"] for r in data["rows"]} - {"all"})
    lines = ["| plan | bits here | at 32k | all [95%] | " + " | ".join(kinds) + " |", "|---" * (4 + len(kinds)) + "|"]
    for plan, rows in sorted(found.items(), key=lambda item: -item[1]["all"]["accuracy"]):
        r = rows["all"]
        cells = [f"`{plan}`", f"{r['bits_per_element']:.2f}", f"{r['bits_per_element_at_32k']:.2f}"]
        cells += [f"{100 * r['accuracy']:.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"]
        lines.append("| " + " | ".join([*cells, *(f"{100 * rows[k]['accuracy']:.1f}" for k in kinds)]) + " |")
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "presets": presets,
    "presets-by-length": presets_by_length,
    "decode": decode,
    "decode-qwen": decode_qwen,
    "video-tiny": partial(video_tiny, "setting"),
    "video-tiny-ablations": partial(video_tiny, "ablation"),
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
