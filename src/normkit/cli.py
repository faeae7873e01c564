"""The command line: one visible table of commands."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from normkit import __version__, recipes
from normkit.errors import InputError, NormkitError
from normkit.files import finite, write_json
from normkit.recipes.base import Claim, Finding, System
from normkit.runs import (
    latest_run_folder,
    new_run_folder,
    process_count,
    process_rank,
    read_json,
)

_VERDICT_STYLE = {"holds": "green", "not shown": "yellow", "contradicted": "red"}


@dataclass(frozen=True)
class ListOptions:
    """Options of ``normkit list``.

    Attributes:
        json: print JSON instead of a table.
    """

    json: bool = False


@dataclass(frozen=True)
class VerifyOptions:
    """Options of ``normkit verify``.

    Attributes:
        system: the system to check; all built ones if not given.
        measured: also run the measured claims, which take minutes.
        claims: names of the claims to check; all if not given.
        save: folder to write the measured claims to as ``<system>.json``, with every figure behind
            the verdicts; those that stand there and are not checked now are kept.
        json: print JSON instead of a table.
    """

    system: Annotated[str, tyro.conf.Positional] = ""
    measured: bool = False
    claims: tuple[str, ...] = ()
    save: Path | None = None
    json: bool = False


@dataclass(frozen=True)
class RunOptions:
    """Where ``normkit run`` keeps its run.

    Attributes:
        runs: folder of all runs.
        resume: go on with the latest run of the system, or with ``--folder``.
        folder: the run folder; a new one named by the time if not given.
        dry_run: check the options and stop.
    """

    runs: Path = Path("runs")
    resume: bool = False
    folder: Path | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class ReportOptions:
    """Options of ``normkit report``.

    Attributes:
        folders: run folders; the latest run of every system below ``runs/`` if not given.
        json: print each run's results as JSON.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    json: bool = False


def list_systems(arguments: Sequence[str]) -> None:
    """Show all systems and which are built."""
    options = tyro.cli(ListOptions, args=arguments, prog="normkit list")
    if options.json:
        rows = [
            {"slug": e.slug, "title": e.title, "arxiv": e.arxiv, "area": e.area, "built": e.built}
            for e in recipes.CATALOGUE
        ]
        print(json.dumps(rows, indent=2))
        return
    table = Table("system", "paper", "arXiv", "normalizes", "built")
    for e in recipes.CATALOGUE:
        table.add_row(e.slug, e.title, e.arxiv, e.area, "yes" if e.built else "")
    Console().print(table)


def run(arguments: Sequence[str]) -> None:
    """Run a system's recipe in a new run folder, or go on with an old one."""
    slug, rest = _first(arguments, "run", "SYSTEM")
    system = recipes.load(slug)

    config, options = _parse_run(system, rest)
    if hasattr(config, "validate"):
        config.validate()
    if options.dry_run:
        print(f"{system.slug}: the options are fine")
        return
    if process_count() > 1 and options.folder is None:
        raise InputError("folder: several processes need one run folder; give it with --folder")
    if options.resume:
        folder = options.folder or latest_run_folder(options.runs, system.slug)
        read_json(folder, "config.json")
    else:
        folder = options.folder or new_run_folder(options.runs, system.slug)
        if process_rank() == 0 and (folder / "config.json").exists():
            raise InputError(f"{folder} holds a run already; go on with it by --resume")
        folder.mkdir(parents=True, exist_ok=True)
    system.run(config, folder)


def verify(arguments: Sequence[str]) -> None:
    """Check the published claims and print each verdict beside its figure."""
    options = tyro.cli(VerifyOptions, args=arguments, prog="normkit verify")
    names = [options.system] if options.system else [e.slug for e in recipes.built()]
    kinds = ("exact", "structural", *(("measured",) if options.measured else ()))
    found: list[tuple[str, Claim, Finding]] = []
    console = Console(stderr=True)
    for name in names:
        system = recipes.load(name)
        for claim in system.claims:
            if claim.name in options.claims or (not options.claims and claim.kind in kinds):
                with console.status(f"{system.slug}: {claim.name}"):
                    found.append((system.slug, claim, claim.check()))
    unknown = set(options.claims) - {claim.name for _, claim, _ in found}
    if unknown:
        raise InputError(f"claims: there is no claim {', '.join(sorted(unknown))}")
    rows = [_finding_row(*line) for line in found]
    if options.save is not None:
        _save_findings(options.save, rows)
    if options.json:
        print(json.dumps(finite(rows), indent=2))
    else:
        table = Table("system", "claim", "kind", "published", "measured", "verdict")
        for slug, claim, finding in found:
            style = _VERDICT_STYLE[finding.verdict]
            verdict = f"[{style}]{finding.verdict}[/]"
            row = (slug, claim.statement, claim.kind, claim.published, finding.measured, verdict)
            table.add_row(*row)
        Console().print(table)
    broken = [c.name for _, c, f in found if c.kind != "measured" and f.verdict != "holds"]
    if broken:
        raise NormkitError(f"claims that must hold do not: {', '.join(broken)}")


def _save_findings(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Keep the measured claims of ``rows``; the others are checked with every run of the tests."""
    rows = [{**row, "details": _rounded(row["details"])} for row in rows if _measured(row)]
    for name in dict.fromkeys(row["system"] for row in rows):
        file = folder / f"{name}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        found = {row["claim"]: row for row in kept if _measured(row)}
        found.update({row["claim"]: row for row in rows if row["system"] == name})
        order = [claim.name for claim in recipes.load(name).claims]
        write_json(file, [found[claim] for claim in order if claim in found])


def _measured(row: Mapping[str, Any]) -> bool:
    return bool(row["kind"] == "measured")


def _rounded(value: Any) -> Any:
    """Six digits of every number: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _finding_row(slug: str, claim: Claim, finding: Finding) -> dict[str, Any]:
    return {
        "system": slug,
        "claim": claim.name,
        "statement": claim.statement,
        "kind": claim.kind,
        "published": claim.published,
        "measured": finding.measured,
        "verdict": finding.verdict,
        "details": dict(finding.details),
    }


def report(arguments: Sequence[str]) -> None:
    """Write the report pages of runs anew and print where they are."""
    from normkit.report.page import write_report

    options = tyro.cli(ReportOptions, args=arguments, prog="normkit report")
    folders = list(options.folders)
    if not folders:
        folders = [
            latest_run_folder("runs", e.slug)
            for e in recipes.built()
            if any(Path("runs", e.slug).glob("*/config.json"))
        ]
    if not folders:
        raise InputError("there is no run below runs/; start one with: normkit run mapo")
    for folder in folders:
        page = write_report(folder)
        print(json.dumps(read_json(folder, "results.json"), indent=2) if options.json else page)


def _elsewhere(module: str, purpose: str) -> Callable[[Sequence[str]], None]:
    """Return the command of ``normkit.commands.<module>``, loaded when it is called."""

    def command(arguments: Sequence[str]) -> None:
        importlib.import_module(f"normkit.commands.{module}").main(arguments)

    command.__doc__ = purpose
    return command


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "list": list_systems,
    "run": run,
    "verify": verify,
    "report": report,
    "advantages": _elsewhere(
        "advantages", "Show what each turn of judged dialogues on disk would be credited with."
    ),
    "evaluate": _elsewhere(
        "evaluate", "Score chat models on EmoBench, EQ-Bench v2 and held-out scenarios."
    ),
    "inspect": _elsewhere(
        "inspect", "Show a model's norms, what they cost, and which conversions apply."
    ),
    "convert": _elsewhere("convert", "Convert a model's norms exactly and write a checkpoint."),
}


def main(arguments: Sequence[str]) -> int:
    """Run one command; return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:11} {f.__doc__}" for name, f in COMMANDS.items()]
        print("usage: normkit COMMAND ...\n\n" + "\n".join(lines))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command = COMMANDS.get(arguments[0])
    try:
        if command is None:
            known = ", ".join(COMMANDS)
            raise InputError(f"there is no command {arguments[0]!r}; choose one of {known}")
        command(arguments[1:])
    except NormkitError as error:
        print(f"normkit: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("normkit: interrupted; go on with --resume", file=sys.stderr)
        return 130
    return 0


def entry() -> None:
    """Entry point of the ``normkit`` program."""
    sys.exit(main(sys.argv[1:]))


def _parse_run(system: System, arguments: Sequence[str]) -> tuple[Any, RunOptions]:
    """Read a recipe's configuration and the run options from one flat list of flags."""

    def both(config: Any, run: Any) -> tuple[Any, RunOptions]:
        return config, run

    flat: Any = tyro.conf.OmitArgPrefixes
    both.__annotations__.update(config=flat[system.Config], run=flat[RunOptions])
    both.__defaults__ = (system.Config(), RunOptions())
    parsed: tuple[Any, RunOptions] = tyro.cli(
        both, args=arguments, prog=f"normkit run {system.slug}", description=f"{system.title}."
    )
    return parsed


def _first(arguments: Sequence[str], command: str, what: str) -> tuple[str, list[str]]:
    if not arguments or arguments[0].startswith("-"):
        raise InputError(f"name a system: normkit {command} {what} (see: normkit list)")
    return arguments[0], list(arguments[1:])
