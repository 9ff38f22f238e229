"""`bitsandheads heads score | show | compare`, and plans with head scores, as a user types them."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tm
import torch
import transformers
from typer.testing import CliRunner

import bitsandheads as bh
from bitsandheads import HeadScores, cli
from bitsandheads.cli import app
from bitsandheads.tasks import reasoning


def invoke(*args, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in args])
    if code == 0 and result.exception is not None:
        raise result.exception
    assert result.exit_code == code
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model on disk, with a tokenizer of the reasoning problems' vocabulary."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = tm._causal("Qwen3", 16, vocab_size=len(reasoning.VOCABULARY), eos_token_id=reasoning.EOS, pad_token_id=reasoning.PAD)
    model.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(reasoning.VOCABULARY)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(reasoning.PATTERN), "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(path)
    return path


WINDOW = ("--sink", 2, "--recent", 6)


@pytest.mark.parametrize("method", ["mass", "ablation"])
def test_score_on_generated_problems_and_on_a_file(folder: Path, method: str, tmp_path: Path) -> None:
    common = ("heads", "score", "--method", method, "--model", folder, "--new-tokens", 12, *WINDOW)
    assert "wrote" in invoke(*common, "--problems", "reasoning:train:6:3", "--output", tmp_path / "a.tsv")
    scores = HeadScores.read(tmp_path / "a.tsv")
    assert (scores.method, scores.sink, scores.recent, scores.data) == (method, 2, 6, "reasoning:train:6:3")
    assert scores.model == str(folder) and scores.commit and scores.extra == {"sequences": 6}
    assert scores.values.min() > 0
    scores.check(transformers.AutoConfig.from_pretrained(folder))
    lines = [json.dumps({"prompt": s.prompt, "answer": s.answer}) for s in reasoning.samples("train", 6, 3)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    invoke(*common, "--problems", tmp_path / "p.jsonl", "--output", tmp_path / "b.tsv")
    assert np.array_equal(HeadScores.read(tmp_path / "b.tsv").values, scores.values)


def test_score_on_a_text_and_random(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(s.prompt for s in reasoning.samples("train", 20)))
    score = ("heads", "score", "--model", folder, *WINDOW)
    invoke(*score, "--method", "mass", "--text", text, "--count", 3, "--length", 64, "--prompt", 16, "--output", tmp_path / "m.tsv")
    assert HeadScores.read(tmp_path / "m.tsv").extra == {"sequences": 3}
    invoke(*score, "--method", "random", "--seed", 4, "--output", tmp_path / "r.tsv")
    found = HeadScores.read(tmp_path / "r.tsv")
    assert found.seed == 4 and found.model == str(folder)
    for more in ((), ("--text", text, "--problems", "reasoning:train:6:3")):
        with pytest.raises(bh.PlanError, match="either --problems or --text"):
            invoke(*score, "--method", "mass", *more, "--output", tmp_path / "x.tsv")


def test_show_marks_the_kept_heads(tmp_path: Path) -> None:
    HeadScores([[0.0, 1.0], [0.45, 0.95]], model="tiny", method="mass", sink=4, recent=8).save(tmp_path / "s.tsv")
    out = invoke("heads", "show", tmp_path / "s.tsv", "--sparsity", 0.5, "--png", tmp_path / "map.png")
    rows = [line[7:].rstrip() for line in out.splitlines() if line.strip()[:1] in ("0", "1") and "to 9" not in line]
    assert rows == [" 0 [9]  1", " 4 [9]  1"]
    assert "method  mass" in out and "the 2 of 4 heads" in out
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "map.png").stat().st_size > 5000
    invoke("heads", "show", tmp_path / "s.tsv", "--png", tmp_path / "map.svg")
    assert "<svg" in (tmp_path / "map.svg").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.png", "map.svg", "s.tsv"]


def test_show_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HeadScores(np.eye(2)).save(tmp_path / "s.tsv")
    from bitsandheads.headfinding.drawing import PlotError

    with pytest.raises(PlotError, match=r"\.svg"):
        invoke("heads", "show", tmp_path / "s.tsv", "--png", tmp_path / "map.txt")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotError, match="plots"):
        invoke("heads", "show", tmp_path / "s.tsv", "--png", tmp_path / "map.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.tsv"]
    invoke("heads", "show", tmp_path / "s.tsv", "--sparsity", 2, code=2)


def test_compare(tmp_path: Path) -> None:
    HeadScores([[4, 3, 2, 1, 0]]).save(tmp_path / "a.tsv")
    HeadScores([[0, 1, 2, 3, 4]]).save(tmp_path / "b.tsv")
    out = invoke("heads", "compare", tmp_path / "a.tsv", tmp_path / "b.tsv")
    assert "-1.000" in out
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [c[:3] for c in cells] == [["0.2", "4", "3"], ["0.4", "3", "1"], ["0.5", "3", "1"], ["0.6", "2", "0"], ["0.8", "1", "0"]]


def test_plan_shows_both_sparsities(folder: Path, tmp_path: Path) -> None:
    scores = HeadScores([[4, 3], [2, 1]])
    scores.save(tmp_path / "s.tsv")
    out = invoke("plan", f"rlkv:{tmp_path / 's.tsv'}@0.5", "--model", folder, "--tokens", 32768)
    assert "50.0% of the KV heads windowed, 49.7% of the bytes saved" in out
    assert "window: sink 32 + recent 128" in out
    HeadScores(np.eye(3)).save(tmp_path / "s.tsv")
    with pytest.raises(bh.ModelMismatchError):
        invoke("plan", f"rlkv:{tmp_path / 's.tsv'}@0.5", "--model", folder)


def test_what_users_type_is_printed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("score", "train", "curriculum"):
        assert "reasoning:SPLIT" in invoke("heads", command, "--help")  # ":train:" would be an emoji
    monkeypatch.setattr(
        sys, "argv", ["bitsandheads", "heads", "train", "--model", "x", "--problems", "[/a]:train:", "--output", str(tmp_path)]
    )
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "'[/a]:train:'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("plan balanced --model {0}/unknown", "does not recognize this architecture"),
        ("plan balanced --model {0}/empty", "Unrecognized model"),
        ("heads train --model {0}/empty --problems reasoning:train:2:0 --output {0}/out --dry-run", "it needs a tokenizer"),
        ("heads score --method mass --model {1} --text {0}/binary --output {0}/x.tsv", "binary cannot be read as text"),
        ("heads score --method random --model {1} --output {0}/nowhere/x.tsv", "No such file or directory"),
        ("heads distill --model {1} --problems reasoning:train:2:0 --output {0}/x.tsv", "has no chat template"),
        ("eval --model {0}/cut --tasks needle --output {0}/run", "cannot be loaded; it needs .* weights"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And exit code 2."""
    for name, config in (("unknown", {"model_type": "nothing-known"}), ("empty", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "binary").write_bytes(bytes([0xFF, 0xFE, 0]))
    shutil.copytree(folder, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 1000)
    monkeypatch.setattr(sys, "argv", ["bitsandheads", *arguments.format(tmp_path, folder).split()])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(said, last) and re.match(r"\w+Error: ", last)
