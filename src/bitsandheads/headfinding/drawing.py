"""Head scores as a picture: layers from top to bottom, KV heads from left to right, the kept heads marked."""

from pathlib import Path

import numpy as np
from rich.text import Text

from ..errors import BitsAndHeadsError
from ..scores import HeadScores

LEVELS = 10  # a score is drawn as a digit, 0 the lowest tenth of the range, 9 the highest
COLOURS = ("grey42", "grey50", "grey62", "steel_blue", "deep_sky_blue3", "cyan3", "green3", "chartreuse3", "gold1", "bright_yellow")


class PlotError(BitsAndHeadsError, ImportError):
    """A picture that cannot be drawn because the extra `plots` is not installed."""


def levels(values: np.ndarray) -> np.ndarray:
    """int [layers, KV heads], 0 to 9: the tenth of the scores' range that each lies in; 0 where all are equal."""
    low, high = float(values.min()), float(values.max())
    return np.minimum(((values - low) / ((high - low) or 1) * LEVELS).astype(int), LEVELS - 1)


def terminal_map(scores: HeadScores, sparsity: float) -> Text:
    """The map in characters: a digit for each head, [in brackets] where it is kept whole at this sparsity."""
    kept = scores.top(1 - sparsity)
    out = Text(f"{'layer':>5}  " + "".join(f"{h:^3}" for h in range(scores.values.shape[1])) + "  KV head\n", style="bold")
    for layer, row, keep in zip(scores.layers, levels(scores.values), kept, strict=True):
        out.append(f"{layer:5}  ", "not bold")
        for level, k in zip(row.tolist(), keep.tolist(), strict=True):
            out.append(f"[{level}]" if k else f" {level} ", f"{COLOURS[level]} {'bold' if k else 'not bold'}")
        out.append(f"  {int(keep.sum()) or '-'}\n", "not bold")
    low, high = float(scores.values.min()), float(scores.values.max())
    out.append(
        f"0 to 9: scores from {low:.3g} to {high:.3g}; in brackets: the {int(kept.sum())} of {kept.size} heads that are kept", "not bold"
    )
    return out


def save_picture(scores: HeadScores, sparsity: float, path: Path) -> None:
    """Write the map as a picture (PNG, SVG or PDF by the path's ending), the kept heads marked with a dot.

    Raises:
        PlotError: matplotlib is not installed, or it does not know the ending.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError('Pictures need matplotlib. Run `pip install "bitsandheads[plots]"`.') from error
    layers, heads = scores.values.shape
    figure = Figure(figsize=(2.4 + 0.34 * heads, 1.8 + 0.2 * layers), layout="constrained", dpi=150)
    axes = figure.subplots()
    image = axes.imshow(scores.values, aspect="auto", cmap="viridis", interpolation="nearest")
    rows, columns = np.nonzero(scores.top(1 - sparsity))
    axes.scatter(columns, rows, s=16, c="white", edgecolors="black", linewidths=0.8, label=f"kept at sparsity {sparsity:g}")
    axes.set(xlabel="KV head", ylabel="layer", xticks=range(heads))
    step = max(1, layers // 16)
    axes.set_yticks(range(0, layers, step), [str(i) for i in scores.layers[::step]])
    figure.suptitle(" ".join(filter(None, (scores.method, scores.model))) or "head scores", fontsize=9)
    figure.legend(loc="outside lower center", fontsize=8)
    figure.colorbar(image, ax=axes, label="score")
    part = path.with_name(f".{path.name}.part{path.suffix}")  # the ending chooses the format
    try:
        figure.savefig(part)
        part.replace(path)
    except ValueError as error:
        raise PlotError(f"The picture cannot be written to {path}: {error}. Give a path that ends in .png, .svg or .pdf.") from error
    finally:
        part.unlink(missing_ok=True)
