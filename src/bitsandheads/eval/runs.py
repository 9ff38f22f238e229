"""A run's folder: `run.json` (what was run, with what) and `records.jsonl` (one line for each sample, appended as it goes)."""

import fcntl
import json
import os
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from ..errors import BitsAndHeadsError, FileFormatError
from .environment import versions, write_json

RUN, RECORDS = "run.json", "records.jsonl"
KEY = ("task", "plan", "seed", "id")  # no two records of a folder share these


class RunFolderError(BitsAndHeadsError, ValueError):
    """A run folder that cannot be continued or read."""


def commit() -> str | None:
    """The commit of the source tree that this package runs from, with "+" if files differ from it; None outside of a git tree."""

    def git(*arguments: str) -> str:
        where = Path(__file__).parent
        return subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ".")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def read_records(path: Path) -> list[dict[str, Any]]:
    """All whole records of a folder; a last line that a kill tore is left out.

    Raises:
        FileFormatError: another line is no JSON.
    """
    return _parse(path / RECORDS)[0] if (path / RECORDS).is_file() else []


def _parse(file: Path) -> tuple[list[dict[str, Any]], int]:
    """Records, and the bytes that they take up."""
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise FileFormatError(f"{file}, line {number} is no JSON record ({error}). Restore the file, or start a new run.") from error
    return records, len(whole)


def read_run(path: Path) -> dict[str, Any]:
    """The contents of run.json.

    Raises:
        RunFolderError: the folder has none.
    """
    try:
        return json.loads((path / RUN).read_text())
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{path} is no run folder: its {RUN} cannot be read ({error}). Give a folder that an evaluation wrote."
        ) from error


class RunFolder:
    """A folder that one process at a time writes to. A killed run goes on where it stopped.

        with RunFolder(path, config) as folder:
            evaluate(model, tokenizer, task, caches, folder)

    Args:
        path: a new or empty folder, or one of a run with the same configuration.
        config: everything that decides what the records are, as JSON values.
        facts: more that a reader wants to know, as JSON values; written when the run begins.
    Raises:
        RunFolderError: the folder belongs to a run with another configuration, another process is writing to it, or it holds
            something else.
        FileFormatError: its records are damaged otherwise than by a torn last line, which is removed.
    """

    def __init__(self, path: Path, config: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.config = json.loads(json.dumps(config))
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file; give a folder.")
        self.path.mkdir(parents=True, exist_ok=True)
        known = (self.path / RUN).is_file()
        if known:
            self._check_config(read_run(self.path)["config"])
        elif foreign := sorted(p.name for p in self.path.iterdir() if p.name != RUN + ".part"):
            raise RunFolderError(f"{self.path} holds no run, but {', '.join(foreign[:5])}. Give a new or empty folder.")
        if not known:
            started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            about = {"config": self.config, "versions": versions(), "commit": commit(), "started": started, "facts": dict(facts or {})}
            write_json(about, self.path / RUN)
        self._file = self._open()
        records, size = _parse(self.path / RECORDS)
        os.ftruncate(self._file.fileno(), size)
        self._keys = {tuple(r[k] for k in KEY) for r in records}

    def _check_config(self, old: dict[str, Any]) -> None:
        different = sorted(k for k in old.keys() | self.config.keys() if old.get(k) != self.config.get(k))
        if different:
            was = "; ".join(f"{k} was {old.get(k)!r}, now {self.config.get(k)!r}" for k in different)
            raise RunFolderError(f"{self.path} holds a run with another configuration: {was}. Give the same, or another folder.")

    def _open(self) -> BinaryIO:
        file = (self.path / RECORDS).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise RunFolderError(f"Another process is writing to {self.path}. Wait for it, or give another folder.") from error
        return file

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write."""
        self._file.close()

    def done(self, task: str, plan: str, seed: int) -> set[str]:
        """Ids of the samples that have a record."""
        return {id for t, p, s, id in self._keys if (t, p, s) == (task, plan, seed)}

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records; on return they are on the disk.

        Raises:
            RunFolderError: one is already there; nothing is written.
        """
        records = list(records)
        keys = [tuple(r[k] for k in KEY) for r in records]
        if twice := self._keys.intersection(keys):
            raise RunFolderError(f"{self.path} already holds the records {sorted(map(str, twice))[:3]}.")
        self._file.write(b"".join(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in records))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._keys.update(keys)

    def records(self) -> list[dict[str, Any]]:
        """All records."""
        return read_records(self.path)
