"""The run folder: everything that a run leaves behind, and that it needs to go on.

::

    runs/<slug>/<time>/
        config.json      the configuration, as given
        metrics.jsonl    one JSON object a step
        dialogues.jsonl  (or other tables) samples, one JSON object a line
        events/          TensorBoard, where it is installed
        checkpoint/      what a killed run resumes from
        results.json     what the run ended with
        report.html      and plots/*.png
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from normkit.errors import InputError
from normkit.files import finite, write_json, write_text


def process_count() -> int:
    """How many processes torchrun or another launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_rank() -> int:
    """Which of them this one is; the one of rank 0 writes the run folder."""
    return int(os.environ.get("RANK", "0"))


def leave(code: int) -> NoReturn:
    """End this process of several as multiprocessing ends its own: without the interpreter's end.

    Threads of gloo let go of the tensors that they exchanged when they come to it, and need the
    interpreter for that. One that comes to it while the interpreter ends aborts the process (torch
    2.13), though all work is done; DistributedDataParallel keeps these threads to the very end.

    Args:
        code: the exit code.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def new_run_folder(root: str | Path, slug: str) -> Path:
    """Make and return ``root/slug/<time>``, a folder that did not exist before.

    Raises:
        InputError: where a thousand runs began in this second.
    """
    base = Path(root) / slug
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1000):
        folder = base / (stamp if attempt == 0 else f"{stamp}_{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise InputError(f"{base} is full of runs of this second; wait a moment and start again")


def latest_run_folder(root: str | Path, slug: str) -> Path:
    """Return the newest run of ``slug`` that holds a configuration.

    Raises:
        InputError: where there is none.
    """
    runs = sorted(p.parent for p in (Path(root) / slug).glob("*/config.json"))
    if not runs:
        raise InputError(f"no run of {slug!r} below {root}; start one with: normkit run {slug}")
    return runs[-1]


class RunLogger:
    """Writes a run's numbers, text and configuration to its folder.

    Lines are flushed as they are written. A resumed run first forgets the lines that are newer
    than its checkpoint (:meth:`rewind`), so that each step stands in ``metrics.jsonl`` once.

    Args:
        folder: the run folder.
        tensorboard: also write TensorBoard events, where tensorboard is installed.
    """

    def __init__(self, folder: str | Path, tensorboard: bool = True) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._events = SummaryWriter(str(self.folder / "events"))  # type: ignore[no-untyped-call, unused-ignore]

    def config(self, config: Any) -> None:
        """Write ``config.json`` from a dataclass or a mapping."""
        given_type = dataclasses.is_dataclass(config) and not isinstance(config, type)
        values = dataclasses.asdict(config) if given_type else dict(config)
        write_json(self.folder / "config.json", _plain(values))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one step's numbers to ``metrics.jsonl`` (and to the TensorBoard events)."""
        self.append("metrics", [{"step": step, **values}])
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._events.add_scalar(name, value, step)
            self._events.flush()

    def append(self, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to ``<table>.jsonl``."""
        with (self.folder / f"{table}.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(finite(_plain(dict(row))), ensure_ascii=False) + "\n")
            file.flush()

    def begin(self, config: Any) -> None:
        """Start from nothing: keep the configuration, forget all rows of an earlier attempt."""
        self.config(config)
        for path in self.folder.glob("*.jsonl"):
            path.unlink()

    def go_on(self, config: Any) -> None:
        """Go on with what is there: keep the configuration, unless the run began with one."""
        if not (self.folder / "config.json").exists():
            self.config(config)

    def rewind(self, step: int) -> None:
        """Forget all logged rows of steps after ``step``, and a last line that was cut short."""
        for path in self.folder.glob("*.jsonl"):
            kept = [row for row in _lines(path) if row.get("step", -1) <= step]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
            write_text(path, text)

    def results(self, results: Mapping[str, Any]) -> None:
        """Write ``results.json``."""
        write_json(self.folder / "results.json", _plain(dict(results)))

    def close(self) -> None:
        """Finish the TensorBoard events."""
        if self._events is not None:
            self._events.close()


def read_table(folder: str | Path, table: str = "metrics") -> list[dict[str, Any]]:
    """Read ``<table>.jsonl`` of a run; an absent table is empty, a line cut short is left out."""
    path = Path(folder) / f"{table}.jsonl"
    return list(_lines(path)) if path.exists() else []


def read_json(folder: str | Path, name: str) -> dict[str, Any]:
    """Read one JSON file of a run folder.

    Raises:
        InputError: where the file is absent or is not a JSON object.
    """
    path = Path(folder) / name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist; is {folder} a run folder?") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path} line {error.lineno} is not JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    # Not by splitlines, which also cuts at the line separators that JSON leaves in strings.
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            yield row


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
