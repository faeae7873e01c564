"""``normkit evaluate`` from its arguments to its tables and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tests.rl.evaluation
from normkit.commands import evaluate
from normkit.errors import InputError, NormkitError
from normkit.recipes import mapo
from normkit.rl.environments.empathy import EmpathyConfig, EmpathyEnvironment
from normkit.rl.environments.epm import EPMConfig
from normkit.rl.environments.tool_tasks import make_tasks
from normkit.rl.rollout import RolloutConfig
from normkit.rl.trainer import Trainer, TrainerConfig
from normkit.runs import RunLogger
from tests.rl.chat_server import Answer, chat_server, free_port, last_user
from tests.rl.fakes import TableJudge, filled, scenario
from tests.rl.tiny import tiny_model, tiny_tokenizer

DATA = Path(tests.rl.evaluation.__file__).parent / "data"
EMOBENCH, EQBENCH = ["--emobench", str(DATA)], ["--eqbench", str(DATA / "eqbench.json")]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NORMKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folders(tmp_path):
    """Two tiny models as transformers keeps them."""
    tokenizer = tiny_tokenizer()
    paths = [tmp_path / "one", tmp_path / "two"]
    for seed, path in enumerate(paths):
        tiny_model(tokenizer, seed).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return [str(path) for path in paths]


@pytest.fixture
def world(monkeypatch):
    """The empathy world with a judge that likes letters."""

    class Judge(TableJudge):
        def judge(self, requests):
            return [filled((int(any(c.isalpha() for c in r.reply)), 0)) for r in requests]

    def build(config, folder):
        scenarios = [scenario(f"career-{i}", opening=f"Message {i}.") for i in range(4)]
        epm = EPMConfig(max_turns=config.max_turns, min_turns=config.min_turns)
        return EmpathyEnvironment(
            scenarios[3:], scenarios[:3], Judge(), None, EmpathyConfig(epm=epm)
        )

    monkeypatch.setattr(mapo, "make_environment", build)
    return build


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name at least one model"),
        (["m"], "choose what to evaluate on"),
        (["m", "m", *EQBENCH], "models must be different"),
        (["m", "--emobench", "absent"], "must be a folder with EA.jsonl or EU.jsonl"),
        (["m", "--eqbench", "absent.json"], "absent.json cannot be read"),
        (["m", "--eqbench", str(DATA / "EA.jsonl")], "line 1: reference_answer_fullscale must be"),
        (["m", "--world", "mars"], "world must be one of empathy, tools, search, games"),
        (["m", "--world", "search", "--max-turns", "0"], "max_turns must be at least 1"),
        (["m", "--world", "search", "--corpus", "absent"], "needs a file of questions"),
        (["m", "--world", "search", "--questions", "absent"], "absent cannot be read"),
        (["m", "--world", "games", "--max-turns", "3"], "max_turns must be left out"),
        (["m", "--world", "games", "--opponents", "deep-blue"], "opponent must be random"),
        (["m", "--repeats", "0", *EMOBENCH], "repeats must be at least 1"),
        (["m", "--likelihood", *EQBENCH], "likelihood is a way to score EmoBench"),
        (["m", "--likelihood", "--url", "http://127.0.0.1:1", *EMOBENCH], "needs models on this"),
        (["m", "--url", "nowhere", *EQBENCH], "url must look like"),
        (["m", "--world", "empathy", "--judge", "llm"], "judge_model"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words):
    with pytest.raises(InputError, match=words) as caught:
        evaluate.main(arguments)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_model_without_a_chat_template_is_refused(tmp_path, folders):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tiny_model(tokenizer).save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="has no chat template"):
        evaluate.main([str(tmp_path / "plain"), *EQBENCH])


def test_a_server_that_is_down_stops_the_run():
    with pytest.raises(NormkitError, match="is the server running"):
        evaluate.main(["m", "--url", f"http://127.0.0.1:{free_port()}", *EQBENCH])


def test_local_models_are_compared_on_benchmarks(folders, tmp_path, capsys):
    out = tmp_path / "results" / "figures.json"
    common = ["--max-tokens", "8", "--repeats", "2", "--language", "en", "--out", str(out)]
    evaluate.main([*folders, *EMOBENCH, "--likelihood", *EQBENCH, *common, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["models"]) == folders
    first, second = (printed["models"][folder]["measures"] for folder in folders)
    assert first["EmoBench EA en"]["n"] == 4
    assert first["EQ-Bench v2"] is None  # eight letters of a model without sense are no answer
    assert not any("zh" in name for name in first)
    gain = printed["differences"][folders[1]]["EmoBench EA en"]
    means = [side["EmoBench EA en"]["mean"] for side in (first, second)]
    assert gain["mean"] == pytest.approx(means[1] - means[0])
    kept = json.loads(out.read_text(encoding="utf-8"))
    records = kept["models"][folders[0]].pop("records")
    assert len(records["EmoBench"]) == 7
    assert len(records["EQ-Bench v2"]) == 3
    kept["models"][folders[1]].pop("records")
    assert kept == printed
    assert kept["options"]["likelihood"] is True

    evaluate.main([*folders, *EMOBENCH, "--likelihood", *common])
    table = capsys.readouterr().out
    assert "EmoBench EA en" in table
    assert "paired difference to" in table


def test_models_play_the_held_out_scenarios(folders, world, tmp_path, capsys):
    out = tmp_path / "figures.json"
    options = ["--max-turns", "2", "--max-new-tokens", "6", "--repeats", "2", "--out", str(out)]
    evaluate.main([*folders, "--world", "empathy", *options, "--json"])
    printed = json.loads(capsys.readouterr().out)
    for folder in folders:
        measures = printed["models"][folder]["measures"]
        assert measures["empathy EPM-Q, greedy"]["n"] == 3
        assert measures["empathy EPM-Q, sampled"]["n"] == 3
        assert printed["models"][folder]["counts"]["empathy"]["dialogues"] == 9
    records = json.loads(out.read_text(encoding="utf-8"))["models"][folders[0]]["records"]
    modes = [record["mode"] for record in records["empathy"]]
    assert modes == ["greedy"] * 3 + ["sampled"] * 6
    assert len({record["seed"] for record in records["empathy"]}) == 6
    assert printed["differences"][folders[1]]["empathy EPM-Q, greedy"]["n"] == 3


def test_a_run_is_evaluated_as_its_trainer_evaluates_it(folders, world, tmp_path, capsys):
    from normkit.rl.models import load_policy

    run = tmp_path / "run"
    environment = world(mapo.Config(max_turns=2), run)
    for rank in (0, 2):
        RunLogger(run).config({"model": folders[0], "lora_rank": rank})
        trainer = Trainer(
            *load_policy(folders[0]),
            environment,
            TrainerConfig(lora_rank=rank, groups=1, group_size=2, learning_rate=0.1),
            RolloutConfig(max_new_tokens=6, dtype="float32"),
        )
        trainer.train_step()
        trainer.save(run / "checkpoint")
        expected = trainer.evaluate(greedy=True, seed=12345)
        for name in (run, run / "checkpoint"):
            # The second time as a writer leaves it that was killed between taking and giving.
            if name.name == "checkpoint":
                name.rename(run / "checkpoint.old")
            out = tmp_path / "figures.json"
            short = ["--max-turns", "2", "--max-new-tokens", "6", "--repeats", "1"]
            files = ["--out", str(out), "--dtype", "float32"]
            evaluate.main([str(name), "--world", "empathy", *short, *files])
            kept = json.loads(out.read_text(encoding="utf-8"))
            records = kept["models"][str(name)]["records"]["empathy"][:3]
            replies = [[turn["reply"] for turn in record["turns"]] for record in records]
            assert replies == [[turn.reply for turn in d.turns] for d in expected]
    (run / "config.json").write_text("{}")
    with pytest.raises(InputError, match="does not name its base model"):
        evaluate.main([str(run), "--world", "empathy"])


def test_a_served_model_is_asked_and_played(world, tmp_path, capsys):
    def answer(body, _n):
        asked = last_user(body)
        if "JSON" in asked:
            keys = [key for key in ("answer", "emotion", "cause") if f'"{key}"' in asked]
            return json.dumps(dict.fromkeys(keys, "A"))
        if "First pass scores:" in asked:
            return asked[asked.index("First pass") :].replace("<number>", "5")
        return "I hear you."

    out = tmp_path / "figures.json"
    arguments = ["m", "--world", "empathy", "--max-turns", "2", *EMOBENCH, *EQBENCH]
    arguments += ["--out", str(out), "--json", "--repeats", "2"]
    with chat_server(answer) as server:
        evaluate.main([*arguments, "--url", server.url])
        found = json.loads(capsys.readouterr().out)["models"]["m"]
        asked = len(server.bodies)
        evaluate.main([*arguments, "--url", server.url])
        assert len(server.bodies) == asked + 1  # all but the check comes from the cache
        bodies = server.bodies
    assert json.loads(capsys.readouterr().out)["models"]["m"] == found
    assert found["counts"]["EmoBench"]["unreadable"] == 0
    assert found["measures"]["EQ-Bench v2"]["n"] == 3
    assert found["measures"]["empathy EPM-Q, sampled"]["n"] == 3
    assert {body["temperature"] for body in bodies} == {0.0, 0.7}
    sampled = {body["seed"] for body in bodies if body["temperature"] == 0.7}
    assert sampled == {12345, 12346}


def test_a_server_that_breaks_later_leaves_out_what_it_did_not_answer(tmp_path, capsys):
    def answer(body, n):
        return Answer("too long", status=400) if n == 2 else "no ratings"

    with chat_server(answer) as server:
        evaluate.main(["m", *EQBENCH, "--url", server.url])
    printed = capsys.readouterr().out
    assert "1 of 3 requests failed" in printed
    assert "under 83%" in " ".join(printed.split())


def test_a_limit_takes_the_first_of_everything(folders, world, capsys):
    short = ["--limit", "1", "--max-tokens", "4", "--max-turns", "1", "--max-new-tokens", "4"]
    evaluate.main([folders[0], *EMOBENCH, *EQBENCH, "--world", "empathy", *short, "--json"])
    counts = json.loads(capsys.readouterr().out)["models"][folders[0]]["counts"]
    assert counts["EmoBench"]["answers"] == 4 * 3  # two tasks, two languages, three repeats
    assert counts["EQ-Bench v2"]["answers"] == 1
    assert counts["empathy"]["dialogues"] == 1 + 3


@pytest.mark.parametrize(
    ("name", "label", "count"), [("tools", "solve-F1", 80), ("search", "exact match", 120)]
)
def test_other_worlds_are_played(name, label, count, folders, capsys):
    if name == "search":
        pytest.importorskip("bm25s")
    for folder in folders:  # the prompts are long, byte by byte
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        config["max_position_embeddings"] = 8192
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
    short = ["--limit", "3", "--repeats", "1", "--max-turns", "2", "--max-new-tokens", "4"]
    evaluate.main([*folders, "--world", name, *short, "--json"])
    printed = json.loads(capsys.readouterr().out)
    for found in printed["models"].values():
        assert found["measures"][f"{name} {label}, greedy"]["n"] == 3
        assert found["measures"][f"{name} {label}, sampled"]["mean"] == 0
        assert found["counts"][name]["dialogues"] == 6
    assert printed["differences"][folders[1]][f"{name} {label}, greedy"]["mean"] == 0
    built = evaluate.WORLDS[name].build(evaluate.EvaluateOptions(()), 2)
    assert len(built.tasks("heldout")) == count


def test_games_are_played_against_every_opponent(folders, tmp_path, capsys):
    pytest.importorskip("pyspiel")
    out = tmp_path / "played.json"
    short = ["--opponents", "random", "mcts-5", "--repeats", "1", "--max-new-tokens", "4"]
    evaluate.main([folders[0], "--world", "games", *short, "--out", str(out), "--json"])
    (found,) = json.loads(capsys.readouterr().out)["models"].values()
    assert found["measures"]["games illegal, greedy"] == {"mean": 1, "low": 1, "high": 1, "n": 8}
    # Connect Four twice and Leduc poker in both seats lose 1 chip at once, Hanabi nothing.
    assert -1 <= found["measures"]["games return, greedy"]["mean"] <= -6 / 8
    (said,) = json.loads(out.read_text(encoding="utf-8"))["models"].values()
    names = [record["task"] for record in said["records"]["games"][:8]]
    assert names == [
        *(f"connect_four against {o}, seat {s}" for o in ("random", "mcts-5") for s in (0, 1)),
        *(
            f"{g} against random, seat {s}"
            for g in ("leduc_poker", "simple_hanabi")
            for s in (0, 1)
        ),
    ]


def test_a_served_model_searches(capsys, tmp_path):
    """The server says the reference answer to every question, after a search."""
    pytest.importorskip("bm25s")
    world = evaluate.WORLDS["search"].build(evaluate.EvaluateOptions(()), 5)
    answers = {f"Question: {q.text}": q.answers[0] for q in world.questions.values()}

    def reply(body, _n):
        messages = body["messages"]
        asked = [m["content"] for m in messages if m["role"] == "user"]
        if len(asked) > 1:
            return f"<answer>{answers[asked[0]]}</answer>"
        return "<search>Kesmarrow</search>"

    out = tmp_path / "figures.json"
    with chat_server(reply) as server:
        short = ["--limit", "4", "--repeats", "1", "--out", str(out)]
        evaluate.main(["m", "--url", server.url, "--world", "search", *short, "--json"])
    measures = json.loads(capsys.readouterr().out)["models"]["m"]["measures"]
    assert measures["search exact match, greedy"]["mean"] == 1
    (record, *_) = json.loads(out.read_text(encoding="utf-8"))["models"]["m"]["records"]["search"]
    assert record["end_reason"] == "success"
    assert [turn["reward"] for turn in record["turns"]] == [0, 1]
    assert record["turns"][1]["message"].startswith("<information>")


def test_a_served_model_calls_tools(capsys, tmp_path):
    """The server makes the calls of the reference, in the text and taken out of it by turns."""
    tasks = {task.question: task for task in make_tasks("heldout")}

    def reply(body, _n):
        asked, *results = [m["content"] for m in body["messages"] if m["role"] == "user"]
        if asked not in tasks:
            return "ready"
        task, turn = tasks[asked], len(results)
        if task.id == "warmth-02" and turn == 1:
            return Answer("too long", status=400)
        if turn == len(task.gold):
            return f"<think>Is it <answer>7</answer>?</think><answer>{task.answer}</answer>"
        if turn:
            assert results[-1] == f"<tool_response>{task.results[turn - 1]}</tool_response>"
        call = task.gold[turn].to_json()
        if turn % 2:
            return f"<tool_call>{json.dumps(call)}</tool_call>"
        call["arguments"] = json.dumps(call["arguments"])
        return Answer(None, calls=[{"id": "1", "type": "function", "function": call}])

    out = tmp_path / "figures.json"
    with chat_server(reply) as server:
        short = ["--limit", "4", "--repeats", "1", "--out", str(out)]
        evaluate.main(["m", "--url", server.url, "--world", "tools", *short, "--json"])
    found = json.loads(capsys.readouterr().out)["models"]["m"]
    for mode in ("greedy", "sampled"):
        assert found["measures"][f"tools solve-F1, {mode}"]["mean"] == 1
        assert found["measures"][f"tools answer F1, {mode}"]["mean"] == 1
        assert found["measures"][f"tools calls, {mode}"]["mean"] == 3
    assert found["counts"]["tools"]["without_reply"] == 2
    assert found["measures"]["tools calls, greedy"]["n"] == 3
