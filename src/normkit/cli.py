"""The command line: one visible table of commands."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from normkit import __version__, recipes
from normkit.errors import InputError, NormkitError, meant
from normkit.files import finite, write_json
from normkit.recipes.base import Claim, Finding, System
from normkit.runs import (
    latest_run_folder,
    leave,
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
        resume: go on with the latest run of the system, or with ``--folder``, and the flags that it
            began with.
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
        json: print the results of the runs as JSON, by folder.
    """

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    json: bool = False


def list_systems(arguments: Sequence[str]) -> None:
    """Show all systems and which are built."""
    about = list_systems.__doc__
    options = tyro.cli(ListOptions, args=arguments, prog="normkit list", description=about)
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
    if arguments and arguments[0] in ("-h", "--help"):
        systems = " ".join(entry.slug for entry in recipes.built())
        print(f"usage: normkit run SYSTEM [OPTIONS]\n\n{run.__doc__}\n\nsystems: {systems}")
        print("options of a system: normkit run SYSTEM --help")
        return
    if not arguments or arguments[0].startswith("-"):
        raise InputError("name a system first: normkit run SYSTEM (see: normkit list)")
    system = recipes.load(arguments[0])
    config, options = _parse_run(system, arguments[1:], system.Config())
    if options.resume and not options.dry_run:
        folder = options.folder or latest_run_folder(options.runs, system.slug)
        config = _go_on(system, arguments[1:], folder)
    _validate(config)
    if options.dry_run:
        print(f"{system.slug}: the options are fine")
        return
    if process_count() > 1 and options.folder is None:
        raise InputError("folder: several processes need one run folder; give it with --folder")
    if not options.resume:
        folder = options.folder or new_run_folder(options.runs, system.slug)
        if process_rank() == 0 and (folder / "config.json").exists():
            raise InputError(f"{folder} holds a run already; go on with it by --resume")
        folder.mkdir(parents=True, exist_ok=True)
    try:
        system.run(config, folder)
    except NormkitError:
        if process_rank() == 0 and not options.resume:
            _forget(folder)
        raise
    except KeyboardInterrupt:
        again = f"normkit run {system.slug} --resume --folder {folder}"
        raise KeyboardInterrupt(f"go on with: {again}") from None


def verify(arguments: Sequence[str]) -> None:
    """Check the published claims and print each verdict beside its figure."""
    about = verify.__doc__
    options = tyro.cli(VerifyOptions, args=arguments, prog="normkit verify", description=about)
    chosen = _chosen_claims(options)
    if options.save is not None:
        if not any(claim.kind == "measured" for _, claim in chosen):
            raise InputError("save keeps measured claims; add --measured, or name some by --claims")
        options.save.mkdir(parents=True, exist_ok=True)
        for system, _ in chosen:
            _kept_findings(options.save, system)  # a broken file is found before the experiments
    found: list[tuple[System, Claim, Finding]] = []
    console = Console(stderr=True)
    for system, claim in chosen:
        with console.status(f"{system.slug}: {claim.name}"):
            found.append((system, claim, claim.check()))
        if options.save is not None and claim.kind == "measured":
            _save_finding(options.save, system, _finding_row(*found[-1]))
    if options.json:
        print(json.dumps(finite([_finding_row(*line) for line in found]), indent=2))
    else:
        table = Table("system", "claim", "kind", "published", "measured", "verdict")
        for system, claim, finding in found:
            style = _VERDICT_STYLE[finding.verdict]
            texts = (system.slug, claim.statement, claim.kind, claim.published, finding.measured)
            table.add_row(*map(escape, texts), f"[{style}]{finding.verdict}[/]")
        Console().print(table)
    broken = [c.name for _, c, f in found if c.kind != "measured" and f.verdict != "holds"]
    if broken:
        raise NormkitError(f"claims that must hold do not: {', '.join(broken)}")


def _chosen_claims(options: VerifyOptions) -> list[tuple[System, Claim]]:
    """The claims that the options ask for, each with its system."""
    names = [options.system] if options.system else [e.slug for e in recipes.built()]
    claims = [(system, claim) for system in map(recipes.load, names) for claim in system.claims]
    if not options.claims:
        return [pair for pair in claims if options.measured or pair[1].kind != "measured"]
    known = [claim.name for _, claim in claims]
    for name in options.claims:
        if name not in known:
            raise InputError(f"claims: there is no claim {name!r}{meant(name, known)}")
    return [pair for pair in claims if pair[1].name in options.claims]


def _kept_findings(folder: Path, system: System) -> dict[str, dict[str, Any]]:
    """What an earlier ``--save`` kept of a system's measured claims, by name."""
    file = folder / f"{system.slug}.json"
    if not file.exists():
        return {}
    try:
        return {row["claim"]: row for row in json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{file} holds no findings of normkit; move it away") from None


def _save_finding(folder: Path, system: System, row: Mapping[str, Any]) -> None:
    """Keep a measured finding beside those that stand; the others are checked with every test."""
    kept = _kept_findings(folder, system)
    kept[row["claim"]] = {**row, "details": _rounded(row["details"])}
    measured = [claim.name for claim in system.claims if claim.kind == "measured"]
    write_json(folder / f"{system.slug}.json", [kept[name] for name in measured if name in kept])


def _rounded(value: Any) -> Any:
    """Six digits of every number: more are noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _finding_row(system: System, claim: Claim, finding: Finding) -> dict[str, Any]:
    return {
        "system": system.slug,
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

    about = report.__doc__
    options = tyro.cli(ReportOptions, args=arguments, prog="normkit report", description=about)
    folders = list(options.folders)
    if not folders:
        folders = [
            max(finished).parent
            for e in recipes.built()
            if (finished := list(Path("runs", e.slug).glob("*/results.json")))
        ]
    if not folders:
        raise InputError("there is no finished run below runs/; start one with: normkit run mapo")
    pages = {folder: write_report(folder) for folder in folders}
    if options.json:
        results = {str(folder): read_json(folder, "results.json") for folder in folders}
        print(json.dumps(results, indent=2))
    else:
        print(*pages.values(), sep="\n")


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
            guess, known = meant(arguments[0], COMMANDS), ", ".join(COMMANDS)
            raise InputError(f"there is no command {arguments[0]!r}{guess}; choose one of {known}")
        command(arguments[1:])
        sys.stdout.flush()
    except NormkitError as error:
        print(f"normkit: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        hint = "check the path, its permissions and the space on its disk"
        print(f"normkit: {where}{error.strerror}; {hint}", file=sys.stderr)
        return InputError.exit_code
    except KeyboardInterrupt as error:
        print(f"normkit: interrupted{f'; {error}' if error.args else ''}", file=sys.stderr)
        return 130
    return 0


def entry() -> None:
    """Entry point of the ``normkit`` program."""
    code = main(sys.argv[1:])
    if process_count() > 1:
        leave(code)
    sys.exit(code)


def _parse_run(system: System, arguments: Sequence[str], default: Any) -> tuple[Any, RunOptions]:
    """Read a recipe's configuration and the run options from one flat list of flags."""

    def both(config: Any, run: Any) -> tuple[Any, RunOptions]:
        return config, run

    flat: Any = tyro.conf.OmitArgPrefixes
    both.__annotations__.update(config=flat[system.Config], run=flat[RunOptions])
    both.__defaults__ = (default, RunOptions())
    parsed: tuple[Any, RunOptions] = tyro.cli(
        both, args=arguments, prog=f"normkit run {system.slug}", description=f"{system.title}."
    )
    return parsed


def _validate(config: Any) -> None:
    if hasattr(config, "validate"):
        config.validate()


def _go_on(system: System, arguments: Sequence[str], folder: Path) -> Any:
    """The configuration that a run began with.

    Raises:
        InputError: where the folder holds none of this system, or a flag says otherwise.
    """
    stored, hints = read_json(folder, "config.json"), get_type_hints(system.Config)

    def typed(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        is_path = isinstance(value, str) and Path in get_args(hints.get(name))
        return Path(value) if is_path else value

    try:
        began = system.Config(**{name: typed(name, value) for name, value in stored.items()})
        _validate(began)
    except TypeError as error:
        raise InputError(f"{folder} holds no run of this {system.slug} ({error})") from None
    asked, _ = _parse_run(system, arguments, began)
    for field in fields(began):
        old, new = (getattr(config, field.name) for config in (began, asked))
        if old != new:
            raise InputError(
                f"{field.name}: the run in {folder} began with {old!r}, got {new!r}; leave it out, "
                "or start a new run"
            )
    return began


def _forget(folder: Path) -> None:
    """Remove a run folder that holds nothing but a configuration: its run never began."""
    if {path.name for path in folder.iterdir()} <= {"config.json", "events"}:
        shutil.rmtree(folder)
