"""Run folders and files: whole or not at all, lines once, nothing lost."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from normkit.errors import InputError
from normkit.files import atomic_path, check_file, check_new, write_json, write_text
from normkit.report.page import write_report
from normkit.runs import RunLogger, latest_run_folder, new_run_folder, read_json, read_table
from normkit.statistics import bootstrap_interval


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def fail():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        fail()
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_places_that_cannot_be_written_are_found_out_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    assert check_file(tmp_path / "new" / "file") == tmp_path / "new" / "file"
    assert check_new(str(tmp_path / "new")) == tmp_path / "new"
    for check in (check_file, check_new):
        with pytest.raises(InputError, match=r"cannot be written: .*file is not a folder"):
            check(tmp_path / "file" / "new" / "file")
    with pytest.raises(InputError, match="is a folder; name a file"):
        check_file(tmp_path)
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="exists already"):
            check_new(taken)


def test_nan_is_null_in_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": [math.nan, 1.5, (math.inf,)]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [None, 1.5, [None]]}


def test_lists_of_numbers_stand_on_one_line_and_text_stays_as_it_is(tmp_path):
    value = {
        "numbers": [1, 2.5, True],
        "text": ["a [\n 1,\n 2\n]", "b"],
        "none": [],
        "in": [[1], [2]],
    }
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == value
    assert '"numbers": [1, 2.5, true],' in text


def test_rewinding_forgets_newer_and_broken_lines(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        logger.log(step, {"loss": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    logger.rewind(2)
    assert read_table(tmp_path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]


def test_separators_of_lines_inside_of_texts_cut_no_row(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=False)
    row = {"step": 1, "reply": "a\u2028b\u2029c\x85d\x0ce\r\nf"}
    logger.append("dialogues", [row])
    logger.rewind(1)
    assert read_table(tmp_path, "dialogues") == [row]


def test_a_process_of_several_leaves_without_the_interpreters_end():
    code = """
import atexit, sys
from normkit.runs import leave
class Last:
    def __del__(self):
        print("the interpreter ends")
last = Last()
atexit.register(print, "at exit")
sys.stdout.write("unflushed, ")
leave(3)
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "unflushed, at exit\n", "")


def test_tensorboard_events_are_written(tmp_path):
    logger = RunLogger(tmp_path)
    logger.log(1, {"loss": 0.5, "by_turn": [1.0, 2.0]})
    logger.close()
    assert list((tmp_path / "events").glob("events.out.*"))


def test_run_folders_are_new_and_found_again(tmp_path):
    first, second = new_run_folder(tmp_path, "mapo"), new_run_folder(tmp_path, "mapo")
    assert first != second
    with pytest.raises(InputError, match="no run of 'mapo'"):
        latest_run_folder(tmp_path, "mapo")
    write_json(second / "config.json", {})
    assert latest_run_folder(tmp_path, "mapo") == second


def test_broken_files_are_named(tmp_path):
    with pytest.raises(InputError, match="run folder"):
        read_json(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{\n oops")
    with pytest.raises(InputError, match="line 2 is not JSON"):
        read_json(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="must hold a JSON object"):
        read_json(tmp_path, "config.json")


def test_the_report_escapes_what_models_and_users_say(tmp_path):
    attack = "<script>alert(1)</script>{{ 7 * 7 }}"
    side = {"score": 1.0, "turns": [{"message": attack, "reply": attack, "reward": 1.0}]}
    write_json(tmp_path / "config.json", {"model": attack, "nested": {"a": 1}})
    write_json(tmp_path / "results.json", {"title": attack, "summary": [attack]})
    RunLogger(tmp_path, tensorboard=False).append(
        "pairs", [{"task": attack, "before": side, "after": side}]
    )
    page = write_report(tmp_path).read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "{{ 7 * 7 }}" in page
    assert "nested.a" in page


def test_bootstrap_intervals():
    same = bootstrap_interval([2.0] * 5)
    assert (same.mean, same.low, same.high) == (2, 2, 2)
    found = bootstrap_interval([float(i) for i in range(101)])
    assert found.low < 50 < found.high
    assert 44 - 1 < found.low < 46
    with pytest.raises(InputError, match="finite"):
        bootstrap_interval([])


def test_a_run_that_begins_forgets_the_rows_of_an_earlier_attempt(tmp_path):
    logger = RunLogger(tmp_path, tensorboard=False)
    logger.log(1, {"loss": 0.1})
    logger.append("trials", [{"name": "a"}])
    logger.begin({"steps": 2})
    logger.log(1, {"loss": 0.2})
    assert read_table(tmp_path) == [{"step": 1, "loss": 0.2}]
    assert not (tmp_path / "trials.jsonl").exists()
    assert json.loads((tmp_path / "config.json").read_text()) == {"steps": 2}
