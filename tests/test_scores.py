"""Head scores: ranking, files of every layout, what is refused, comparing."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tm
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bitsandheads import FileFormatError, HeadScores, LayerShape, ModelMismatchError, NotFiniteError, PlanError, ShapeError
from bitsandheads.scores import ScoresNotFoundError, overlap, rank_correlation

RELEASED = Path(__file__).parents[2] / "shared" / "data" / "head_scores"
tables = arrays.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 8)), elements=st.floats(-2, 2, width=32))
needs_released = pytest.mark.skipif(not RELEASED.is_dir(), reason="the released score files are not here")


def some(layers: int = 4, heads: int = 2, seed: int = 0, **fields) -> HeadScores:
    return HeadScores(np.random.default_rng(seed).normal(size=(layers, heads)), **fields)


# -- ranking ----------------------------------------------------------------------------------------------------------------------


@given(values=tables, share=st.floats(0, 1))
def test_top_keeps_the_best_heads_and_breaks_ties_by_layer_and_head(values: np.ndarray, share: float) -> None:
    heads = [(i, j) for i in range(values.shape[0]) for j in range(values.shape[1])]
    best = sorted(heads, key=lambda h: (-values[h], h))
    kept = HeadScores(values).top(share)
    count = int(kept.sum())
    assert {h for h in heads if kept[h]} == set(best[:count])
    assert share * len(heads) - 1e-6 <= count < share * len(heads) + 1


def test_top_counts_are_those_of_the_share_that_was_meant() -> None:
    scores = some(8, 2)
    assert [int(scores.top(1 - s).sum()) for s in (0, 0.2, 0.4, 0.5, 0.6, 0.8, 1)] == [16, 13, 10, 8, 7, 4, 0]
    assert [int(some(5, 4).top(1 - s).sum()) for s in (0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.9)] == [18, 16, 14, 12, 8, 6, 2]


def test_equal_scores_keep_the_first_heads() -> None:
    kept = HeadScores(np.zeros((3, 2))).top(0.5)
    assert kept.tolist() == [[True, True], [True, False], [False, False]]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(PlanError, match="from 0 to 1"):
        some().top(share)


def test_values_may_be_a_tensor_with_a_gradient() -> None:
    gates = torch.ones(3, 2, requires_grad=True, dtype=torch.bfloat16)
    assert HeadScores(gates).values.dtype == np.float32 and HeadScores(gates).top(1).all()


# -- files ------------------------------------------------------------------------------------------------------------------------


@given(values=tables)
def test_files_restore_every_number_and_field(values: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("scores") / "scores.tsv"
    scores = HeadScores(
        values, "name", "mass", 16, 64, "text", 3, "abc", tuple(range(1, 2 * len(values), 2)), {"layers": 9}, {"note": ["ö"]}
    )
    scores.save(path)
    assert HeadScores.read(path) == scores
    assert np.array_equal(np.loadtxt(path, dtype=np.float32, delimiter="\t", ndmin=2), values)  # as the releases' own loaders read
    scores.save(path, plain=True)
    assert HeadScores.read(path) == HeadScores(values)
    assert np.array_equal(np.loadtxt(path, dtype=np.float32, delimiter="\t", ndmin=2), values)


def test_plain_files_are_written_as_the_releases_write_them(tmp_path: Path) -> None:
    scores = some()
    scores.save(tmp_path / "ours.tsv", plain=True)
    np.savetxt(tmp_path / "theirs.tsv", scores.values.astype(float), delimiter="\t")
    assert (tmp_path / "ours.tsv").read_bytes() == (tmp_path / "theirs.tsv").read_bytes()


@needs_released
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("rlkv-Llama-3.1-8B-R1", (32, 8)),
        ("duo-Llama-3.1-8B-R1", (32, 8)),
        ("rlkv-Qwen-2.5-7B-R1", (28, 4)),
        ("rlkv-Qwen-3-4B-Thinking", (36, 8)),
    ],
)
def test_released_files(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    path = RELEASED / f"{name}.tsv"
    scores = HeadScores.read(path)
    assert scores.values.shape == shape
    assert np.array_equal(scores.values, np.loadtxt(path, delimiter="\t").astype(np.float32))
    scores.check([LayerShape(32, shape[1], 128)] * shape[0])
    scores.save(tmp_path / "again.tsv")
    assert HeadScores.read(tmp_path / "again.tsv") == scores


def release(folder: Path, name: str, values: np.ndarray, config: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    np.savetxt(folder / name, values, delimiter="\t")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_folders_of_both_releases(tmp_path: Path) -> None:
    values = np.array([[1.008, -0.011, 0.5], [0.25, 1.2, 0.0]])
    ours = HeadScores.from_pretrained(release(tmp_path / "qwen_lr1e-2", "adapter_weights.tsv", values))
    assert ours.method == "rlkv" and "qwen_lr1e-2" in ours.data and np.array_equal(ours.values, values.astype(np.float32))
    config = {"model_name": "m", "sink_size": 128, "recent_size": 256, "seed": 42, "lr": 0.02}
    duo = HeadScores.from_pretrained(release(tmp_path / "duo", "full_attention_heads.tsv", values, config))
    assert (duo.method, duo.model, duo.sink, duo.recent, duo.seed) == ("duo", "m", 128, 256, 42)
    assert np.array_equal(duo.values, values.clip(0, 1).astype(np.float32))
    (tmp_path / "duo" / "config.json").write_text("{")
    with pytest.raises(FileFormatError, match=r"config\.json"):
        HeadScores.from_pretrained(tmp_path / "duo")


def test_our_file_in_a_folder_comes_first(tmp_path: Path) -> None:
    release(tmp_path / "both", "full_attention_heads.tsv", np.zeros((4, 2)))
    path = some(method="mass").save_pretrained(tmp_path / "both")
    assert HeadScores.from_pretrained(tmp_path / "both") == HeadScores.from_pretrained(path) == some(method="mass")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScoresNotFoundError, match=r"head_scores\.tsv"):
        HeadScores.from_pretrained(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no\.tsv"):
        HeadScores.from_pretrained(tmp_path / "no.tsv")


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own client, offline, on a cache folder of its layout."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    scores = some(method="rlkv")
    scores.save_pretrained(tmp_path / "models--someone--scores" / "snapshots" / commit)
    (tmp_path / "models--someone--scores" / "refs").mkdir()
    (tmp_path / "models--someone--scores" / "refs" / "main").write_text(commit)
    assert HeadScores.from_pretrained("someone/scores") == scores
    for wrong in ("someone/else", "not a name"):
        with pytest.raises(ScoresNotFoundError, match="hub"):
            HeadScores.from_pretrained(wrong)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.tsv"
    some(seed=1).save(path)

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        some(seed=2).save(path)
    assert HeadScores.read(path) == some(seed=1)
    assert list(tmp_path.iterdir()) == [path]


# -- what is refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_must_be_finite(bad: float) -> None:
    values = np.zeros((3, 2))
    values[2, 1] = bad
    with pytest.raises(NotFiniteError, match="layer 2, KV head 1"):
        HeadScores(values)


@pytest.mark.parametrize("values", [np.zeros(4), np.zeros((2, 2, 2)), np.zeros((0, 3)), np.zeros((3, 0))])
def test_scores_must_be_a_table(values: np.ndarray) -> None:
    with pytest.raises(ShapeError, match="KV heads"):
        HeadScores(values)


@pytest.mark.parametrize("layers", [("a", "b", "c"), (0, 1), (0, 1, 2, 3), (0, 0, 1)])
def test_rows_and_layers_must_agree(layers: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="layer for each row"):
        HeadScores(np.zeros((3, 2)), layers=layers)


DAMAGED = {
    "cut": lambda t: t[:-4],
    "changed digit": lambda t: t[:-2] + ("1" if t[-2] != "1" else "2") + "\n",
    "no table": lambda t: t.partition("\n")[0] + "\n",
    "cut header": lambda t: t.replace("}", "", 1),
    "foreign header": lambda t: t.replace("bitsandheads-head-scores", "something"),
    "newer": lambda t: t.replace('"version": 1', '"version": 2'),
    "version of words": lambda t: t.replace('"version": 1', '"version": "one"'),
    "header without layers": lambda t: t.replace('"layers"', '"rows"'),
    "architecture is a list": lambda t: re.sub('"architecture": {[^}]*}', '"architecture": [1]', t),
    "header is a list": lambda t: "# [1]\n" + t.partition("\n")[2],
    "empty": lambda t: "",
    "words": lambda t: "a\tb\n",
    "ragged": lambda t: "1\t2\n3\n",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_and_foreign_files(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "scores.tsv"
    path.write_text(DAMAGED[damage](some(seed=3).to_text()))
    with pytest.raises(FileFormatError, match=r"scores\.tsv") as caught:
        HeadScores.read(path)
    assert ("Update bitsandheads" in str(caught.value)) == (damage in ("newer", "version of words"))


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scores.tsv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(FileFormatError, match="not text"):
        HeadScores.read(tmp_path / "scores.tsv")


def test_check_against_models() -> None:
    model = tm.make("qwen3")
    scores = HeadScores.of(np.zeros((2, 2)), model, "mass", name="tiny", seed=1)
    assert (scores.model, scores.layers, scores.seed) == ("tiny", (0, 1), 1)
    scores.check(model)
    HeadScores(scores.values).check(model.config)  # a plain table knows only its shape
    for values in (np.zeros((3, 2)), np.zeros((1, 2)), np.zeros((2, 4))):
        with pytest.raises(ModelMismatchError, match="KV heads"):
            HeadScores(values).check(model)
    with pytest.raises(ModelMismatchError, match="model_type 'qwen3', not 'llama'"):
        scores.check(tm.make("llama"))


@pytest.mark.parametrize(("name", "layers"), [("gemma3", (1,)), ("qwen3-next", (1,)), ("llama", (0, 1))])
def test_rows_are_the_full_attention_layers(name: str, layers: tuple[int, ...]) -> None:
    model = tm.make(name)
    assert HeadScores.of(np.zeros((len(layers), 2)), model, "random").layers == layers
    if len(layers) == 1:
        with pytest.raises(ModelMismatchError, match=r"layers \[1\]"):
            HeadScores(np.zeros((1, 2))).check(model)  # names layer 0


# -- comparing --------------------------------------------------------------------------------------------------------------------


def test_rank_correlation() -> None:
    a = HeadScores([[1, 2], [3, 4]])
    assert rank_correlation(a, HeadScores([[10, 20], [30, 99]])) == pytest.approx(1)
    assert rank_correlation(a, HeadScores([[4, 3], [2, 1]])) == pytest.approx(-1)
    assert rank_correlation(a, HeadScores([[2, 1], [4, 3]])) == pytest.approx(1 - 6 * 4 / (4 * 15))  # Spearman's formula without ties
    # ties at their mean rank: ranks 1.5 1.5 3 4 against 1 2 3 4
    assert rank_correlation(HeadScores([[0, 0], [1, 2]]), a) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(rank_correlation(a, HeadScores(np.ones((2, 2)))))
    with pytest.raises(ShapeError, match="same model"):
        rank_correlation(a, some())


def test_overlap() -> None:
    a, b = HeadScores([[4, 3], [2, 1]]), HeadScores([[4, 1], [3, 2]])
    assert [overlap(a, b, s) for s in (0, 0.25, 0.5, 0.75)] == [1, pytest.approx(2 / 3), 0.5, 1]
    assert np.isnan(overlap(a, b, 1))


@needs_released
def test_learned_scores_of_the_releases_differ() -> None:
    """Reasoning heads are not retrieval heads: the released RLKV gates and DuoAttention scores of one model agree only in part."""
    rlkv, duo = (HeadScores.read(RELEASED / f"{m}-Llama-3.1-8B-R1.tsv") for m in ("rlkv", "duo"))
    assert 0.4 < rank_correlation(rlkv, duo) < 0.55
    assert 0.6 < overlap(rlkv, duo, 0.5) < 0.8
