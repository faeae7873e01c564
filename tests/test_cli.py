"""The command line: what it prints, its exit codes, one-sentence errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from normkit import recipes
from normkit.cli import main
from normkit.errors import InputError
from normkit.recipes.base import Claim, Finding
from normkit.runs import RunLogger


def test_list_shows_all_systems(capsys):
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 33
    assert [r["slug"] for r in rows if r["built"]] == [e.slug for e in recipes.built()]
    assert "mapo" in [r["slug"] for r in rows if r["built"]]
    assert main(["list"]) == 0
    assert "mapo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dance"], "there is no command 'dance'; choose one of list"),
        (["runn", "mapo"], "did you mean run?"),
        (["run"], "name a system"),
        (["run", "--dry-run", "mapo"], "name a system first"),
        (["run", "nope"], "there is no system 'nope'; see: normkit list"),
        (["run", "maop"], "did you mean mapo?"),
        (["run", "ST_PPO"], "did you mean st-ppo?"),
        (["run", "swan"], "not built yet"),
        (["run", "mapo", "--baseline", "nope"], "estimator must be one of"),
        (["verify", "mapo", "--claims", "nope"], "there is no claim 'nope'"),
        (["verify", "mapo", "--claims", "held-out-gain"], "did you mean heldout-gain?"),
        (["verify", "layernorm", "--save", "out"], "save keeps measured claims"),
        (["verify", "mapo", "--measured", "--save", "file"], "file: File exists; check the path"),
        (["verify", "mapo", "--measured", "--save", "broken"], "mapo.json holds no findings"),
        (["report", "no-such-folder"], "is no-such-folder a run folder"),
        (["report", "file"], "is file a run folder"),
        (["report", "binary"], "is not UTF-8"),
        (["report", "odd"], "summary must be a list"),
        (["report"], "there is no finished run below runs/"),
        (["run", "mapo", "--folder", "file"], "file: File exists; check the path"),
        (["run", "mapo", "--folder", "file/below"], "file/below: Not a directory"),
        (["run", "mapo", "--runs", "file"], "Not a directory"),
        (["run", "mapo", "--folder", "binary"], "holds a run already"),
        (["run", "mapo", "--resume", "--folder", "file"], "is file a run folder"),
        (["run", "mapo", "--resume", "--folder", "binary"], "is not UTF-8"),
        (["run", "mapo", "--resume", "--folder", "other"], "other holds no run of this mapo"),
        (["advantages", "no-such-file.json"], "cannot be read"),
        (["run", "mapo", "--resume", "--runs", "no-runs"], "no run of 'mapo'"),
        (["run", "mapo", "--steps", "0", "--dry-run"], "steps must be at least 1"),
        (["run", "mapo", "--temperature", "0", "--dry-run"], "temperature must be above 0"),
        (["run", "mapo", "--alpha", "nan", "--dry-run"], "alpha must be in 0..1"),
        (["run", "mapo", "--max-turns", "0", "--dry-run"], "max_turns must be at least 1"),
        (["run", "mapo", "--seed", "-1", "--dry-run"], "seed must be at least 0"),
        (["run", "mapo", "--save-hf", "binary", "--dry-run"], "binary exists already"),
        (["convert", "none", "--to", "folded", "--out", "file/x"], "file is not a folder"),
        (["convert", "none", "--to", "folded", "--out", "x", "--onnx", "odd"], "name a file"),
        (["evaluate", "none", "--world", "tools", "--out", "odd"], "odd is a folder"),
        (["advantages", "odd", "--plot", "file/x"], "file is not a folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(
    arguments, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("a file, where a folder is expected")
    for name, config, results in (
        ("binary", b"\xff", b"\xff"),
        ("other", b'{"height": 3}', b"{}"),
        ("odd", b"{}", b'{"summary": 3}'),
    ):
        Path(name).mkdir()
        Path(name, "config.json").write_bytes(config)
        Path(name, "results.json").write_bytes(results)
    Path("broken").mkdir()
    Path("broken", "mapo.json").write_text("[3]")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("entry", recipes.built(), ids=lambda e: e.slug)
def test_every_recipe_takes_its_options(entry, capsys):
    assert main(["run", entry.slug, "--dry-run"]) == 0
    assert "fine" in capsys.readouterr().out
    for alias in entry.aliases:
        assert main(["run", alias, "--dry-run"]) == 0


def test_unknown_flags_exit_with_two():
    with pytest.raises(SystemExit) as caught:
        main(["run", "mapo", "--no-such-flag", "1"])
    assert caught.value.code == 2


@pytest.mark.parametrize("entry", recipes.built(), ids=lambda e: e.slug)
def test_exact_and_structural_claims_hold(entry, capsys):
    assert main(["verify", entry.slug, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert {r["verdict"] for r in rows} == {"holds"}


@dataclass(frozen=True)
class Toy:
    """Flags of a recipe that is done at once."""

    height: float = 1.0
    names: tuple[str, ...] = ()
    source: Path | None = None
    mode: str = ""

    def validate(self):
        if self.height < 0:
            raise InputError("height must not be negative")


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A recipe whose configurations are kept in the list it returns; its mode may stop it."""
    ran = []

    def run(config, folder):
        if not (folder / "config.json").exists():
            RunLogger(folder, tensorboard=False).config(config)
        ran.append(config)
        if config.mode == "refuse":
            raise InputError("mode must not be refuse")
        if config.mode == "interrupt" and len(ran) == 1:
            raise KeyboardInterrupt

    system = replace(recipes.load("mapo"), Config=Toy, run=run)
    monkeypatch.setattr(recipes, "load", lambda _: system)
    monkeypatch.chdir(tmp_path)
    return ran


def test_a_resumed_run_keeps_the_flags_it_began_with(toy, capsys):
    flags = ["--height", "2.5", "--names", "a", "b", "--source", "here", "--mode", "interrupt"]
    assert main(["run", "mapo", *flags]) == 130
    again = capsys.readouterr().err.strip().partition("go on with: normkit ")[2].split()
    assert main(again) == 0
    assert main(["run", "mapo", "--resume"]) == 0
    assert toy == [Toy(2.5, ("a", "b"), Path("here"), "interrupt")] * 3

    assert main(["run", "mapo", "--resume", "--height", "2.5"]) == 0
    assert main(["run", "mapo", "--resume", "--height", "1.0"]) == 2
    assert "height: the run in" in capsys.readouterr().err
    assert len(toy) == 4


def test_a_run_that_never_began_leaves_nothing(toy):
    assert main(["run", "mapo", "--height", "-1"]) == 2
    assert main(["run", "mapo", "--mode", "refuse"]) == 2
    assert [len(list(Path("runs").glob("*/*"))), len(toy)] == [0, 1]


def test_the_help_of_run_names_the_systems(capsys):
    assert main(["run", "--help"]) == 0
    assert "st-ppo" in capsys.readouterr().out


def test_reports_of_several_runs_are_one_json(tmp_path, monkeypatch, capsys):
    pytest.importorskip("jinja2")
    monkeypatch.chdir(tmp_path)
    for time, score in (("1", 1.0), ("2", 2.0), ("3", None)):
        for slug in ("mapo", "mars"):
            logger = RunLogger(f"runs/{slug}/{time}", tensorboard=False)
            logger.config({})
            if score is not None:  # the latest run has not ended
                logger.results({"score": score})
    assert main(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "runs/mapo/2": {"score": 2.0},
        "runs/mars/2": {"score": 2.0},
    }


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "import sys; from normkit.cli import main; sys.exit(main(['list', '--json']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_several_processes_need_one_folder(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", "mapo"]) == 2
    assert "--folder" in capsys.readouterr().err


def test_verify_keeps_its_measured_findings(tmp_path, monkeypatch):
    def claim(name, kind, found):
        finding = Finding("holds", f"{found:.1f}", {"seeds": [found, 1 / 3], "ends": (found, "b")})
        return Claim(name, "it is so", "1", kind, lambda: finding)

    def check(found, *options):
        claims = [claim("a", "measured", found), claim("b", "exact", 0), claim("c", "measured", 5)]
        system = replace(recipes.load("mapo"), claims=claims)
        with monkeypatch.context() as patch:
            patch.setattr(recipes, "load", lambda _: system)
            assert main(["verify", "mapo", "--save", str(tmp_path), *options]) == 0
        return json.loads((tmp_path / "mapo.json").read_text())

    saved = check(1.0, "--measured")
    assert [row["claim"] for row in saved] == ["a", "c"]
    assert saved[0]["details"] == {"seeds": [1.0, 0.333333], "ends": [1.0, "b"]}
    again = check(2.0, "--claims", "a")
    assert [row["measured"] for row in again] == ["2.0", "5.0"]


_WITHOUT_EXTRAS = """
import importlib, pkgutil, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
import normkit, normkit.cli
from normkit.errors import MissingDependencyError
for module in pkgutil.walk_packages(normkit.__path__, "normkit."):
    try:
        importlib.import_module(module.name)
    except MissingDependencyError as error:
        print(module.name, str(error).partition("pip install ")[2])
sys.exit(normkit.cli.main(["run", "mapo", "--world", "tabular", "--dry-run"]))
"""


def test_without_extras_modules_import_or_name_theirs():
    extras = (
        "accelerate bm25s datasets gguf httpx jinja2 matplotlib onnx onnxruntime onnxscript peft "
        "pyspiel scipy sklearn tenacity tokenizers transformers trl yaml"
    )
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_EXTRAS, extras.replace(" ", ",")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert last == "mapo: the options are fine"
    missing = dict(line.split(" ", 1) for line in lines)
    assert missing["normkit.rl.trainer"] == "'normkit[rl]'"
    needy = ("commands.evaluate", "integrations.", "recipes._", "rl.")
    assert all(name.removeprefix("normkit.").startswith(needy) for name in missing)
