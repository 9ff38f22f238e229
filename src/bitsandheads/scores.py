"""Head scores: how much each KV head needs its whole past, however that was found, in one small text file.

The file is the plain table that RLKV and DuoAttention publish (one row for each layer, one column for each KV head, separated by
tabs), below one line with a JSON header that begins with "# ". So `numpy.loadtxt` and the loaders of both releases read it as it
is, two files can be compared with `diff`, and the header says where the numbers come from. `read` takes plain tables too.
"""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BitsAndHeadsError, FileFormatError, ModelMismatchError, NotFiniteError, PlanError, ShapeError

FORMAT, FORMAT_VERSION = "bitsandheads-head-scores", 1
FILE_NAME = "head_scores.tsv"
FOREIGN_NAMES = {"adapter_weights.tsv": "RLKV", "full_attention_heads.tsv": "DuoAttention"}  # as their releases name the tables
ROUNDING = 1e-9  # a share times the number of heads may be this far from the whole number that was meant


class ScoresNotFoundError(BitsAndHeadsError, FileNotFoundError):
    """Head scores that are neither on disk nor on the hub."""


@dataclass(frozen=True, eq=False)
class HeadScores:
    """A score for every KV head of a model: the higher, the more the head needs all tokens.

    Attributes:
        values: float32 [layers, KV heads], finite. Given as an array, a tensor or nested lists.
        model: name of the model.
        method: how the scores were found, for example "rlkv", "duo", "mass", "ablation", "random".
        sink, recent: the window that they were found with; None: unknown or none.
        data: what they were found on.
        seed: of the random numbers; None: none were used, or unknown.
        commit: version of the code that found them.
        layers: index in the model of each row's layer; empty: 0, 1, 2, ... Hybrid models have rows for their full-attention layers only.
        architecture: what a model must share (see seam.fingerprint); empty: unknown, only the shape is checked.
        extra: further fields, JSON values.
    Raises:
        ShapeError: values that are not a table, or other rows than `layers` says.
        NotFiniteError: NaN or infinity.
    """

    values: np.ndarray
    model: str = ""
    method: str = ""
    sink: int | None = None
    recent: int | None = None
    data: str = ""
    seed: int | None = None
    commit: str = ""
    layers: tuple[int, ...] = ()
    architecture: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given: Any = self.values
        values = np.array(given.detach().float().cpu().tolist() if hasattr(given, "detach") else given, dtype=np.float32)
        if values.ndim != 2 or 0 in values.shape:
            raise ShapeError(f"Head scores have shape {list(values.shape)}; give [layers, KV heads], one row for each layer.")
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            raise NotFiniteError(
                f"The score of layer {row}, KV head {column} is {values[row, column]}; every score must be a finite number."
            )
        layers = tuple(self.layers) or tuple(range(len(values)))
        if len(layers) != len(values) or len(set(layers)) != len(layers) or not all(isinstance(i, Integral) for i in layers):
            raise ShapeError(f"Head scores have {len(values)} rows and name {len(layers)} layers; name a different layer for each row.")
        values.setflags(write=False)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "layers", layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadScores) and self._header() == other._header() and np.array_equal(self.values, other.values)

    # -- use --------------------------------------------------------------------------------------------------------------------

    def top(self, share: float) -> np.ndarray:
        """The best heads of the whole model: bool [layers, KV heads], ceil(share * heads) of them True.

        Ranked by value, unclamped. Tie rule: of equal values the lower layer comes first, then the lower head.
        Raises PlanError where share is not in [0, 1].
        """
        if not 0 <= share <= 1:
            raise PlanError(f"The share of heads is {share!r}; give a number from 0 to 1.")
        keep = np.zeros(self.values.size, dtype=bool)
        order = np.argsort(-self.values.ravel(), kind="stable")
        keep[order[: math.ceil(share * self.values.size - ROUNDING)]] = True
        return keep.reshape(self.values.shape)

    def check(self, config: Any) -> None:
        """Raise ModelMismatchError where the scores do not belong to a model (or its configuration, or a list of LayerShape)."""
        found: dict[str, Any] = {}
        if isinstance(config, list):
            shapes = config
        else:
            from .seam import fingerprint, layer_shapes

            shapes, found = layer_shapes(config), fingerprint(config)
        layers = tuple(i for i, s in enumerate(shapes) if s.compressed)
        heads = sorted({shapes[i].kv_heads for i in layers})
        name = f"The head scores of {self.model or 'an unnamed model'}"
        if self.layers != layers or heads != [self.values.shape[1]]:
            raise ModelMismatchError(
                f"{name} are for {self.values.shape[1]} KV heads in {_layers(self.layers)}, but this model has {heads} KV heads in "
                f"{_layers(layers)} of full attention. Use the scores of this model, or find them with `bitsandheads heads score`."
            )
        wrong = [f"{key} {value!r}, not {found[key]!r}" for key, value in self.architecture.items() if key in found and found[key] != value]
        if wrong:
            raise ModelMismatchError(f"{name} belong to another model: theirs has {'; '.join(wrong)}. Use the scores of this model.")

    @classmethod
    def of(cls, values: Any, model: Any, method: str, **fields: Any) -> "HeadScores":
        """Scores found on a loaded model (or its configuration): name, layers and architecture are taken from it."""
        from .seam import fingerprint, layer_shapes, text_config

        layers = tuple(i for i, s in enumerate(layer_shapes(model)) if s.compressed)
        name = fields.pop("name", "") or getattr(text_config(model), "_name_or_path", "")
        scores = cls(values, model=name, method=method, layers=layers, architecture=fingerprint(model), **fields)
        scores.check(model)
        return scores

    # -- files ------------------------------------------------------------------------------------------------------------------

    def _header(self) -> dict[str, Any]:
        own = {k: getattr(self, k) for k in ("model", "method", "sink", "recent", "data", "seed", "commit", "architecture", "extra")}
        return own | {"layers": list(self.layers)}

    def to_text(self) -> str:
        """The file's text. Numbers have the nine digits that restore every float32 exactly."""
        body = _table(self.values, "%.9g")
        header = {"format": FORMAT, "version": FORMAT_VERSION} | self._header()
        header |= {"shape": list(self.values.shape), "sha256": hashlib.sha256(body.encode()).hexdigest()}
        return f"# {json.dumps(header)}\n{body}"

    @classmethod
    def from_text(cls, text: str, source: str = "the text") -> "HeadScores":
        """Inverse of `to_text`; a plain table without a header gives scores without model and method.

        Raises:
            FileFormatError: damaged, foreign, or written by a newer version; source says what was read.
        """
        if not text.startswith("#"):
            return cls(_parse(text, source))
        line, _, body = text.partition("\n")
        try:
            header = json.loads(line[1:])
        except json.JSONDecodeError as error:
            raise FileFormatError(f"{source} is no file of head scores: its first line is no JSON header ({error}).") from error
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise FileFormatError(f'{source} is no file of head scores: its header has no "format": "{FORMAT}".')
        version = header.get("version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise FileFormatError(
                f"{source} has format version {version!r}; this release reads up to {FORMAT_VERSION}. Update bitsandheads."
            )
        if hashlib.sha256(body.encode()).hexdigest() != header.get("sha256"):
            raise FileFormatError(
                f"{source} is damaged: its table is not the one that was written. Copy it again, or find the scores anew."
            )
        known = {k: header[k] for k in header if k in cls.__dataclass_fields__}
        try:
            known |= {"layers": tuple(header["layers"]), "architecture": dict(header["architecture"])}
            return cls(_parse(body, source), **known)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, BitsAndHeadsError):
                raise
            raise FileFormatError(f"{source} is damaged: its header is incomplete ({error}).") from error

    def save(self, path: str | Path, plain: bool = False) -> None:
        """Write the file, whole or not at all. plain: the table alone, as RLKV and DuoAttention write it ("%.18e")."""
        write_text(Path(path), _table(self.values, "%.18e") if plain else self.to_text())

    @classmethod
    def read(cls, path: str | Path) -> "HeadScores":
        """Read a file: ours, or a plain table of RLKV or DuoAttention.

        Beside a plain table a config.json with sink_size and recent_size, as DuoAttention keeps it, gives model, window and seed,
        and the file's name the method. A table of DuoAttention is clipped to [0, 1], as its own loader does.

        Raises:
            ScoresNotFoundError: there is no such file.
            FileFormatError: it holds no head scores.
        """
        path = Path(path)
        if not path.is_file():
            raise ScoresNotFoundError(f"There is no file of head scores {str(path)!r}. Find scores with `bitsandheads heads score`.")
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{path} is no file of head scores: it is not text ({error}).") from error
        scores = cls.from_text(text, str(path))
        release = FOREIGN_NAMES.get(path.name)
        if text.startswith("#") or release is None:
            return scores
        scores = replace(scores, method="duo" if release == "DuoAttention" else "rlkv", data=f"release of {release}, {path.parent.name}")
        if release == "DuoAttention":
            scores = replace(scores, values=scores.values.clip(0, 1), **_duo_config(path.with_name("config.json")))
        return scores

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> "HeadScores":
        """Head scores from a file, a local folder or a repository of the hub.

        In a folder or repository the file is head_scores.tsv, or the table of an RLKV or DuoAttention release.

        Raises:
            ScoresNotFoundError: nothing of that name, or no file of head scores in it.
        """
        path = Path(name)
        if path.is_dir():
            return cls.read(path / _choose((p.name for p in path.iterdir()), str(name)))
        if path.is_file() or path.suffix == ".tsv" or path.is_absolute():
            return cls.read(path)
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            folder = Path(snapshot_download(str(name), revision=revision, allow_patterns=[FILE_NAME, *FOREIGN_NAMES, "config.json"]))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ScoresNotFoundError(
                f"No head scores {str(name)!r}: it is no file or folder here, and the hub did not give it ({error}). "
                "Give a file, a folder, or the name of a hub repository while online."
            ) from error
        return cls.read(folder / _choose((p.name for p in folder.iterdir()), str(name)))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write head_scores.tsv into a folder (made if need be), as `from_pretrained` finds it; returns its path."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / FILE_NAME
        self.save(path)
        return path


# -- comparing ----------------------------------------------------------------------------------------------------------------------


def rank_correlation(a: HeadScores, b: HeadScores) -> float:
    """Spearman's rank correlation over all heads, ties at their mean rank; NaN where all scores of one side are equal."""
    _comparable(a, b)
    x, y = _ranks(a.values.ravel()), _ranks(b.values.ravel())
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def overlap(a: HeadScores, b: HeadScores, sparsity: float) -> float:
    """Of the heads that `a` keeps whole at this sparsity the share that `b` keeps too; by chance it is 1 - sparsity. NaN if none is kept."""
    _comparable(a, b)
    kept = a.top(1 - sparsity)
    return float(b.top(1 - sparsity)[kept].mean()) if kept.any() else float("nan")


def _comparable(a: HeadScores, b: HeadScores) -> None:
    if a.values.shape != b.values.shape or a.layers != b.layers:
        raise ShapeError(
            f"Scores of {list(a.values.shape)} and of {list(b.values.shape)} (layers, KV heads) cannot be compared. "
            "Give two files for the same model."
        )


def _ranks(x: np.ndarray) -> np.ndarray:
    _, inverse, count = np.unique(x, return_inverse=True, return_counts=True)
    last = count.cumsum()
    return (last - (count - 1) / 2)[inverse]


# -- helpers ------------------------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Read a text file. Raises FileFormatError where there is none, or it is no text."""
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} cannot be read as text ({error}); give a text file in UTF-8.") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    handle, part = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _table(values: np.ndarray, number: str) -> str:
    return "".join("\t".join(number % x for x in row) + "\n" for row in values)


def _parse(text: str, source: str) -> np.ndarray:
    rows = [line.split() for line in text.splitlines() if line.strip()]
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1:
        what = f"its rows have {widths} columns" if rows else "it has no rows"
        raise FileFormatError(f"{source} is no table of head scores: {what}; each layer's row needs one number for each KV head.")
    try:
        return np.array([[float(x) for x in row] for row in rows], dtype=np.float32)
    except ValueError as error:
        raise FileFormatError(f"{source} is no table of head scores: {error}.") from error


def _choose(names: Iterable[str], where: str) -> str:
    present = set(names)
    for name in (FILE_NAME, *FOREIGN_NAMES):
        if name in present:
            return name
    raise ScoresNotFoundError(f"{where!r} holds no head scores: none of {FILE_NAME}, {', '.join(FOREIGN_NAMES)} is there.")


def _duo_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text("utf-8"))
        names = {"model_name": "model", "sink_size": "sink", "recent_size": "recent", "seed": "seed"}
        return {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise FileFormatError(f"{path} is no configuration of DuoAttention ({error}); remove it or copy it again.") from error


def _layers(layers: tuple[int, ...]) -> str:
    return f"{len(layers)} layers" if layers == tuple(range(len(layers))) else f"the layers {list(layers)}"
