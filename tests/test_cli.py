"""The command line: what it prints, its exit codes, one-sentence errors."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from normkit import recipes
from normkit.cli import main
from normkit.recipes.base import Claim, Finding


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
        (["dance"], "there is no command 'dance'"),
        (["run"], "name a system"),
        (["run", "nope"], "there is no system 'nope'"),
        (["run", "swan"], "not built yet"),
        (["run", "mapo", "--baseline", "nope"], "estimator must be one of"),
        (["verify", "mapo", "--claims", "nope"], "there is no claim nope"),
        (["report", "no-such-folder"], "is no-such-folder a run folder"),
        (["advantages", "no-such-file.json"], "cannot be read"),
        (["run", "mapo", "--resume", "--runs", "no-runs"], "no run of 'mapo'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(
    arguments, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
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


def test_importing_normkit_needs_no_extra():
    extras = ("transformers", "accelerate", "peft", "httpx", "yaml", "matplotlib", "sklearn")
    blocked = "; ".join(f"sys.modules[{name!r}] = None" for name in extras)
    code = (
        f"import sys; {blocked}; import normkit, normkit.cli, normkit.functional.moments, "
        "normkit.rl.advantage, normkit.rl.loss, normkit.rl.judges; "
        "sys.exit(normkit.cli.main(['list', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
