"""``normkit inspect``: the norms of a model, what they cost, and which conversions apply."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from normkit.errors import check_least
from normkit.surgery.pretrained import dtype_of, load_pretrained
from normkit.surgery.samples import sample_inputs
from normkit.surgery.survey import NormRow, Survey, survey


@dataclass(frozen=True)
class InspectOptions:
    """Options of ``normkit inspect``: the norms of a model, and which conversions apply.

    Attributes:
        model: "smollm2", a folder that transformers or normkit wrote, or a name on the hub.
        batch: examples per forward pass.
        length: tokens per example, for a model of text.
        repeats: forward passes that are timed.
        json: print JSON instead of a table.
    """

    model: Annotated[str, tyro.conf.Positional]
    batch: int = 1
    length: int = 128
    repeats: int = 5
    json: bool = False


def main(arguments: Sequence[str]) -> None:
    """Run ``normkit inspect``."""
    options = tyro.cli(InspectOptions, args=arguments, prog="normkit inspect")
    check_least(options, 1, "batch", "length", "repeats")
    console = Console(stderr=True)
    with console.status(f"loading {options.model}"):
        model, _ = load_pretrained(options.model)
    with console.status(f"measuring {type(model).__name__}, trying conversions on copies of it"):
        found = survey(model, sample_inputs(model, options.batch, options.length), options.repeats)
    if options.json:
        print(json.dumps(as_dict(model, found), indent=2))
    else:
        show(model, found)


def as_dict(model: Any, found: Survey) -> dict[str, Any]:
    """Return a survey as JSON-ready values."""
    shares = {name: found.share(name) for name in ("parameters", "seconds", "saved_bytes")}
    return {
        "model": type(model).__name__,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "parameters": found.parameters,
        "seconds": found.seconds,
        "saved_bytes": found.saved_bytes,
        "share_of_norms": shares,
        "norms": [dataclasses.asdict(row) for row in found.norms],
        "conversions": dict(found.conversions),
    }


def show(model: Any, found: Survey) -> None:
    """Print a survey as tables."""
    console = Console()
    table = Table(title=f"{type(model).__name__}: {len(found.norms)} norms", title_justify="left")
    for column in ("norms", "class", "place, read by"):
        table.add_column(column, overflow="fold")
    for column in ("values", "time", "kept"):
        table.add_column(column, justify="right")
    for name, rows in _alike(found).items():
        first = rows[0]
        readers = ", ".join(_beside(first.name, reader) for reader in first.readers)
        table.add_row(
            f"{len(rows)} x {name}" if len(rows) > 1 else name,
            f"{first.kind}({' x '.join(map(str, first.shape))})",
            f"{first.place}: {readers or 'nobody on the sample'}",
            f"{sum(row.parameters for row in rows):,}",
            f"{100 * sum(row.seconds for row in rows) / found.seconds:.2f}%",
            f"{100 * sum(row.saved_bytes for row in rows) / max(found.saved_bytes, 1):.2f}%",
        )
    console.print(table)
    console.print(
        f"all norms: {100 * found.share('parameters'):.3f}% of {found.parameters:,} parameters, "
        f"{100 * found.share('seconds'):.1f}% of {1e3 * found.seconds:.1f} ms a forward pass, "
        f"{100 * found.share('saved_bytes'):.1f}% of {found.saved_bytes / 1e6:.1f} MB kept for "
        "the backward pass"
    )
    for name, verdict in found.conversions.items():
        console.print(f"{name}: {verdict}", soft_wrap=True, highlight=False)


def _alike(found: Survey) -> dict[str, list[NormRow]]:
    """Group norms that differ in the number of their block only, whose place a star takes."""
    groups: dict[str, list[NormRow]] = {}
    for row in found.norms:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", row.name)
        groups.setdefault(name, []).append(row)
    return groups


def _beside(path: str, reader: str) -> str:
    """Shorten a reader's path by what it has in common with the norm's."""
    block = path.rpartition(".")[0]
    return reader.removeprefix(f"{block}.") if block else reader
