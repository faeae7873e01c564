"""The tool world through TRL's environment_factory: its tools, its loop, our advantages."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from normkit.errors import InputError
from normkit.rl.advantage import estimate
from normkit.rl.environment import Reply
from normkit.rl.environments.tools import ToolWorld, ToolWorldConfig
from normkit.rl.models import load_policy
from normkit.rl.tool_calls import ToolCall
from tests.rl.tiny import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed (the extra 'trl')")
integration = pytest.importorskip("normkit.integrations.trl")
tools = pytest.importorskip("normkit.integrations.trl_tools")

pytestmark = pytest.mark.filterwarnings("ignore")

GROUP = 4


def written(call):
    return f"<tool_call>\n{json.dumps(call.to_json())}\n</tool_call>"


def script(world, task):
    """Four dialogues of a task: as the reference, half of it, wrong and repeated calls, chatter."""
    reference = world.start(task, 0).reference
    gold, answer = reference.gold, f"<answer>{reference.answer}</answer>"
    wrong = ToolCall("weekday", {"day": "soon", "hour": 3})
    return [
        ["Plan 0. " + written(gold[0]), *map(written, gold[1:]), answer],
        ["Plan 1. " + written(gold[0]) + written(gold[0]), answer],
        ["Plan 2. " + written(wrong), written(ToolCall("nothing")), written(gold[-1]), "?"],
        ["Plan 3. <tool_call>{broken</tool_call>"],
    ]


class Scripted:
    """TRL's generation of one round, replaced: every dialogue says what its script says."""

    def __init__(self, trainer, world):
        self.tokenizer, self.world = trainer.processing_class, world
        self.seen = []

    def __call__(self, prompt_ids, images, fields, num_generations, has_tool_images=False):
        replies = []
        for place, ids in enumerate(prompt_ids):
            text = self.tokenizer.decode(ids)
            self.seen.append(text)
            talk = text.split("<|im_start|>")
            question = next(part for part in talk if part.startswith("user\n"))
            (task,) = [t for t in self.world.tasks("train") if self.asks(t) in question]
            said = [part for part in talk if part.startswith("assistant\n")]
            plan = place % GROUP if len(said) == 1 else int(said[0].split("Plan ")[1][0])
            replies.append(script(self.world, task)[plan][len(said) - 1])
        ids = [self.tokenizer(text + "<|im_end|>")["input_ids"] for text in replies]
        return ids, None

    def asks(self, task):
        return self.world.start(task, 0).message


def make(folder, world, groups=2, **changes):
    from trl.chat_template_utils import qwen2_5_chat_template

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = qwen2_5_chat_template
    model = tiny_model(tokenizer)
    model.config.max_position_embeddings = 16384  # a byte is a token, and the tools are described
    arguments = trl.GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=groups * GROUP,
        num_generations=GROUP,
        max_completion_length=4000,
        max_tool_calling_iterations=world.max_turns - 1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        gradient_checkpointing=False,
        **{"max_steps": 2, "learning_rate": 1e-2, **changes},
    )
    trainer = integration.TurnAdvantageTrainer(
        model,
        args=arguments,
        estimator="matchtir",
        processing_class=tokenizer,
        **tools.tool_calling(world),
    )
    trainer._generate_single_turn = Scripted(trainer, world)
    return trainer


def held(world, task, replies):
    """What the world pays a dialogue that is held in it."""
    session = world.start(task, 0)
    for reply in replies:
        (step,) = world.step([session], [Reply(reply)])
    return step.info["turn_rewards"], world.score(session)


def test_tools_are_methods_with_the_schema_of_the_world():
    from transformers.utils import get_json_schema

    world = ToolWorld()
    environment = tools.tool_calling(world)["environment_factory"]()
    for name, tool in world.box.tools.items():
        found = get_json_schema(getattr(environment, name))["function"]
        expected = tool.to_json()["function"]
        kinds = {n: {"type": p["type"]} for n, p in found["parameters"]["properties"].items()}
        assert (found["name"], found["description"]) == (name, expected["description"])
        assert kinds == expected["parameters"]["properties"]
        assert found["parameters"]["required"] == expected["parameters"]["required"]
    assert environment.calculator(expression="2*3") == "6"
    assert environment.weekday(day=3) == "error: day must be a string"
    assert environment.weekday(hour=3) == "error: weekday takes day"


def test_tokens_get_the_advantages_of_the_same_dialogues_in_the_world(tmp_path):
    world = ToolWorld(ToolWorldConfig(max_turns=8))
    trainer = make(tmp_path, world)
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    output = trainer._generate_and_score_completions(inputs)
    paid = [
        held(world, example["task"], script(world, example["task"])[i % GROUP])
        for i, example in enumerate(inputs)
    ]
    rows = [(r, b, t, b // GROUP) for b, (row, _) in enumerate(paid) for t, r in enumerate(row)]
    columns = [torch.tensor(column) for column in zip(*rows, strict=True)]
    expected = estimate("matchtir", columns[0].double(), *columns[1:])
    mask = (output["completion_mask"] * output["tool_mask"]).bool()
    lengths = [
        len(trainer.processing_class(text + "<|im_end|>")["input_ids"])
        for i, example in enumerate(inputs)
        for text in script(world, example["task"])[i % GROUP]
    ]
    torch.testing.assert_close(
        output["advantages"][mask].double(),
        expected.repeat_interleave(torch.tensor(lengths)),
        atol=1e-6,
        rtol=1e-6,
    )
    assert not bool(output["advantages"][~mask].any())
    assert len(set(expected.tolist())) > 2 * GROUP
    # The world was asked in full: the first of each group solved everything.
    assert [score["score"] for _, score in paid[::GROUP]] == [1.0, 1.0]


def test_the_model_reads_what_the_tools_return(tmp_path):
    world = ToolWorld(ToolWorldConfig(max_turns=8))
    trainer = make(tmp_path, world)
    trainer.model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer._generate_and_score_completions(inputs)
    text = "\n".join(trainer._generate_single_turn.seen)
    for example in inputs:
        for result in world.start(example["task"], 0).reference.results[:-1]:
            assert f"<tool_response>\n{result}" in text
    assert "error: weekday takes day" in text
    assert "Tool nothing not found." in text


class Recited:
    """TRL's generation of one round, replaced: the next reply of the dialogue so far."""

    def __init__(self, dialogues):
        self.rows = {
            tuple(d.segments[0].token_ids[:start]): d.segments[0].token_ids[start:stop]
            for d in dialogues
            for _, start, stop in d.segments[0].spans
        }

    def __call__(self, prompt_ids, images, fields, num_generations, has_tool_images=False):
        return [list(self.rows[tuple(ids)]) for ids in prompt_ids], None


def test_reference_dialogues_are_what_trl_would_have_written(tmp_path):
    world = ToolWorld(ToolWorldConfig(max_turns=8))
    trainer = make(tmp_path, world)
    inputs = next(iter(trainer.get_train_dataloader()))
    tasks = sorted({example["task"] for example in inputs})
    dialogues = tools.reference_dialogues(world, tasks, trainer.processing_class)
    assert all(turn.reward == 1 for dialogue in dialogues for turn in dialogue.turns)
    assert all(dialogue.scores["score"] == 1 for dialogue in dialogues)
    trainer._generate_single_turn = Recited(dialogues)
    trainer.model.train()
    output = trainer._generate_and_score_completions(inputs)
    by_task = {dialogue.task: dialogue for dialogue in dialogues}
    for i, example in enumerate(inputs):
        (segment,) = by_task[example["task"]].segments
        begin, mask = segment.spans[0][1], output["completion_mask"][i].bool()
        assert output["completion_ids"][i][mask].tolist() == segment.token_ids[begin:]
        sampled = torch.zeros(len(segment.token_ids))
        for _, start, stop in segment.spans:
            sampled[start:stop] = 1
        assert output["tool_mask"][i][mask].tolist() == sampled[begin:].tolist()
    assert not bool(output["advantages"].any())  # all members of a group are the same


@pytest.mark.parametrize(
    "template",
    [
        None,  # the tiny tokenizer's, which writes no calls
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.last }} {{ m.content }}"
        "{{ m.tool_calls }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>"
        "assistant{% endif %}",
    ],
)
def test_templates_that_cannot_hold_tool_calls_are_refused(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    world = ToolWorld()
    with pytest.raises(InputError, match="must write tool calls"):
        tools.reference_dialogues(world, world.tasks("train")[:1], tokenizer)


def test_turns_after_the_end_earn_nothing():
    world = ToolWorld()
    task = world.tasks("train")[0]
    gold = world.start(task, 0).reference.gold
    replies = ["<answer>perhaps</answer>" + written(gold[0]), written(gold[0]), "?"]
    rewards, scores = tools.replay(world, [task, task], [replies, []])
    assert rewards[0][1:] == [0.0, 0.0]
    assert rewards[1] == []
    assert scores[0]["calls"] == scores[1]["calls"] == 0


@pytest.mark.slow
def test_the_example_warms_a_model_up_saves_it_and_trains_it(tmp_path, monkeypatch, capsys):
    place = Path(__file__).parents[2] / "examples" / "trl_tools.py"
    example = importlib.util.module_from_spec(
        found := importlib.util.spec_from_file_location("trl_tools_example", place)
    )
    found.loader.exec_module(example)
    asked = []

    def load(name):
        asked.append(name)
        if name != "smollm2":
            return load_policy(name)
        model = tiny_model(tokenizer := tiny_tokenizer())
        model.config.max_position_embeddings = 16384
        return model, tokenizer

    monkeypatch.setattr(example, "load_policy", load)
    quick = {"use_cpu": True, "bf16": False, "max_completion_length": 30}
    monkeypatch.setattr(example, "GRPOConfig", lambda **given: trl.GRPOConfig(**given | quick))
    for _ in range(2):  # the second time from the warm model that is there
        example.main(tmp_path, updates=2, lessons=1, steps=1, group_size=2)
    assert asked == ["smollm2", *[str(tmp_path / "warm")] * 2]
    said = capsys.readouterr().out
    assert said.count("nats a token") == 2
    assert said.count("tools/call_frequency") == 2
    trained = load_policy(str(tmp_path / "trained"))[1]
    assert trained.chat_template == example.qwen2_5_chat_template


@pytest.mark.slow
def test_it_trains_and_prefers_the_turns_that_are_paid(tmp_path):
    world = ToolWorld(ToolWorldConfig(max_turns=8))
    tasks = world.tasks("train")[:1]
    world.tasks = lambda split: tasks
    used = {call.name for call in world.start(tasks[0], 0).reference.gold}
    world.box.tools = {n: t for n, t in world.box.tools.items() if n in {"weekday", *used}}
    trainer = make(tmp_path, world, groups=1, max_steps=2)

    def surprise(text):
        ids = torch.tensor([trainer.processing_class(text)["input_ids"]])
        with torch.no_grad():
            return float(trainer.model(input_ids=ids, labels=ids).loss)

    gold = written(world.start(world.tasks("train")[0], 0).reference.gold[1])
    before = surprise(gold), surprise("Plan 3. <tool_call>{broken</tool_call>")
    trainer.train()
    after = surprise(gold), surprise("Plan 3. <tool_call>{broken</tool_call>")
    assert after[0] - before[0] < after[1] - before[1]
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    assert all(0 < row["grad_norm"] < math.inf for row in rows)
    assert all(row["score"] == pytest.approx(rows[0]["score"]) for row in rows)
    assert all(row["tools/call_frequency"] > 1 for row in rows)
