"""Files and folders never half written: a neighbour is filled, flushed and renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from normkit.errors import InputError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Strings in JSON hold no line breaks, so that this finds no part of one.
_NUMBERS = re.compile(r'\[\n([^\[\]{}"]*)\n *\]')


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it when the block ends well.

    If the block raises (a full disk, an interrupt), the temporary file is removed and ``path``
    keeps its earlier content.

    Args:
        path: the file to write; its folder is made if needed.

    Yields:
        The temporary path to write to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _os_errors():
            yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside ``path`` that takes its place when the block ends well.

    If the block raises, the new folder is removed and ``path`` stays as it was. A crash between
    taking the old folder away and putting the new one in place leaves the old one under the name
    that :func:`standing_folder` looks for.

    Args:
        path: the folder to write.

    Yields:
        The empty folder to fill.
    """
    path = Path(path)
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        with _os_errors():
            yield new
        for file in new.rglob("*"):
            if file.is_file():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def check_file(path: str | Path) -> Path:
    """Return ``path`` as the path of a file that can be written, before the work that fills it.

    Raises:
        InputError: if it is a folder, or cannot be written.
    """
    path = _writable(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    return path


def _writable(path: str | Path) -> Path:
    path = Path(path)
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"{path} cannot be written: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: {above} is not yours to write to")
    return path


def check_new(folder: str | Path) -> Path:
    """Return ``folder`` as a path to a folder that can be written anew.

    Raises:
        InputError: if it exists and is not empty, or cannot be written.
    """
    folder = _writable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already; name a folder that does not")
    return folder


def standing_folder(path: str | Path) -> Path:
    """Return ``path``, or the earlier folder that an interrupted :func:`replaced_folder` left."""
    path = Path(path)
    old = path.with_name(path.name + ".old")
    return old if not path.exists() and old.exists() else path


@contextmanager
def _os_errors() -> Iterator[None]:
    """Raise as OSError what safetensors, for a full disk too, has an error of its own for."""
    try:
        yield
    except SafetensorError as error:
        if (found := _OS_ERROR.search(str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON, whole or not at all (NaN becomes null).

    A list of numbers stands on one line.
    """
    text = json.dumps(finite(value), indent=2, ensure_ascii=False)
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    write_text(path, text + "\n")


def finite(value: Any) -> Any:
    """Return ``value`` with every NaN and infinity replaced by None, since JSON has neither."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
