"""normkit in TRL: the same advantages and gradients as the trainer of our own, and training."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from normkit.errors import InputError
from normkit.rl.advantage import ESTIMATORS, estimate, to_tokens
from normkit.rl.dialogue import pack, turn_table
from normkit.rl.rollout import Rollout, RolloutConfig
from tests.rl.talk import LateWorld, ScriptedWorld, check_dialogue, tasks
from tests.rl.test_rollout import Relay
from tests.rl.test_trainer import PlainJudge, make
from tests.rl.tiny import tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed (the extra 'trl')")
integration = pytest.importorskip("normkit.integrations.trl")

pytestmark = pytest.mark.filterwarnings("ignore")


class Scored:
    """A rollout function that returns given dialogues, whatever is asked for."""

    def __init__(self, dialogues):
        self.dialogues = dialogues

    def __call__(self, prompts, trainer):
        assert len(prompts) == len(self.dialogues)
        return integration.completions(self.dialogues)


def arguments(folder, **changes):
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 6,
        "num_generations": 3,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        **changes,
    }
    return trl.GRPOConfig(**options)


def played(judge=None, **changes):
    """Our trainer, and the dialogues of its first step."""
    ours = make(judge=judge, group_size=3, groups=2, **changes)
    return ours, ours.rollout.run(ours.environment, ours.schedule(0))


def theirs(folder, dialogues=None, kind=None, world=None, **changes):
    tokenizer = tiny_tokenizer()
    options = {"rollout_func": Scored(dialogues)} if world is None else {"environment": world}
    if world is None:
        options["reward_funcs"] = [integration.dialogue_reward]
        options["train_dataset"] = integration.task_dataset(make().environment)
    estimator = changes.pop("estimator", None)
    if estimator is not None:
        options["estimator"] = estimator
    return (kind or integration.TurnAdvantageTrainer)(
        tiny_model(tokenizer),
        args=arguments(folder, **changes),
        processing_class=tokenizer,
        **options,
    )


def batch_of(trainer):
    trainer.model.train()
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def tokens_of(ours, dialogues):
    """Advantage of each token after the first prompt, by our trainer."""
    advantage = ours.learner.advantage(turn_table(dialogues))
    rows = [to_tokens(advantage, row.turn_row) for row in pack(dialogues)]
    begins = [dialogue.segments[0].spans[0][1] for dialogue in dialogues]
    return [row[begin:] for row, begin in zip(rows, begins, strict=True)]


@pytest.mark.parametrize("name", [n for n, e in ESTIMATORS.items() if not e.needs])
def test_the_same_dialogues_get_the_advantages_of_our_trainer(name, tmp_path):
    ours, dialogues = played(estimator=name)
    output = batch_of(theirs(tmp_path, dialogues, estimator=name))
    assert output["advantages"].shape == output["completion_ids"].shape
    for row, expected in zip(output["advantages"], tokens_of(ours, dialogues), strict=True):
        torch.testing.assert_close(row[: len(expected)].double(), expected, atol=1e-6, rtol=1e-6)
        assert not bool(row[len(expected) :].any())
    assert bool(output["advantages"].any())
    assert not bool(output["advantages"][output["tool_mask"] == 0].any())


def test_agents_are_credited_apart(tmp_path):
    _, dialogues = played()
    for dialogue in dialogues:
        dialogue.agent = dialogue.index % 2
    output = batch_of(theirs(tmp_path, dialogues, estimator="mars"))
    table = turn_table(dialogues)
    rows = (table.reward, table.dialogue, table.turn, table.group)
    expected = estimate("mars", *rows, agent=table.agent)
    mask = (output["completion_mask"] * output["tool_mask"]).bool()
    lengths = torch.tensor([len(turn.token_ids) for d in dialogues for turn in d.turns])
    torch.testing.assert_close(
        output["advantages"][mask].double(),
        expected.repeat_interleave(lengths),
        atol=1e-6,
        rtol=1e-6,
    )
    # Every seat of every game is centered by itself.
    for game, seat in {*zip(table.group.tolist(), table.agent.tolist(), strict=True)}:
        pool = (table.group == game) & (table.agent == seat)
        assert float(expected[pool].sum()) == pytest.approx(0, abs=1e-9)
    assert not torch.allclose(expected, estimate("mars", *rows))


def test_a_step_has_the_gradient_of_our_trainer(tmp_path):
    ours, dialogues = played(max_grad_norm=1e9)
    trainer = theirs(tmp_path, dialogues, loss_type="dapo")
    inputs = batch_of(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, inputs).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])
    assert float(norm) == pytest.approx(ours.update(dialogues)["grad_norm"], rel=1e-4)


def test_an_unknown_reward_leaves_its_turn_without_an_advantage(tmp_path):
    _, dialogues = played(judge=PlainJudge(fail_on=(1,)))
    output = batch_of(theirs(tmp_path, dialogues))
    table = turn_table(dialogues)
    assert 0 < int((~table.mask).sum()) < len(table.mask)
    advantage = estimate("mapo", table.reward, table.dialogue, table.turn, table.group)
    assert not bool(advantage[~table.mask].any())
    spans = [(d.segments[0].spans, d.segments[0].spans[0][1]) for d in dialogues]
    found = [
        float(output["advantages"][i, start - begin])
        for i, (turns, begin) in enumerate(spans)
        for _, start, _ in turns
    ]
    assert found == pytest.approx(advantage.tolist(), abs=1e-6)


def test_without_turn_rewards_the_outcome_is_earned_in_the_last_turn(tmp_path):
    _, dialogues = played()
    fields = integration.completions(dialogues)
    for name in ("turn_rewards", "turn_ids", "scores"):
        del fields[name]
    rewards = [1.0, 2.0, 4.0, None, 0.0, 3.0]
    trainer = integration.TurnAdvantageTrainer(
        tiny_model(tokenizer := tiny_tokenizer()),
        args=arguments(tmp_path),
        processing_class=tokenizer,
        rollout_func=lambda prompts, _: fields,
        reward_funcs=[lambda **_: rewards],
        train_dataset=integration.task_dataset(make().environment),
    )
    output = batch_of(trainer)
    table = turn_table(dialogues)
    last = torch.tensor([t == len(d.turns) - 1 for d in dialogues for t in range(len(d.turns))])
    outcome = torch.tensor([math.nan if r is None else r for r in rewards]).double()
    reward = torch.where(last, outcome[table.dialogue], 0.0)
    expected = estimate("mapo", reward, table.dialogue, table.turn, table.dialogue // 3)
    found = output["advantages"][output["tool_mask"].bool() & output["completion_mask"].bool()]
    lengths = torch.tensor([len(turn.token_ids) for d in dialogues for turn in d.turns])
    torch.testing.assert_close(
        found.double(), expected.repeat_interleave(lengths), atol=1e-6, rtol=0
    )


def test_an_environment_of_trl_may_keep_its_turn_rewards(tmp_path):
    _, dialogues = played()
    trainer = theirs(tmp_path, dialogues)
    turn = torch.tensor([[0, -1, 1, 1], [0, 0, -1, -1]])
    trainer.environments = [SimpleNamespace(turn_rewards=r) for r in ([1, None], [2.5])]
    first, second = trainer._turn_rewards([{}, {}], turn)
    assert first[0] == 1.0
    assert math.isnan(first[1])
    assert second == [2.5]


def test_the_wrong_number_of_turn_rewards_is_refused(tmp_path):
    _, dialogues = played()
    fields = integration.completions(dialogues)
    fields["turn_rewards"][2] = fields["turn_rewards"][2][:-1]
    trainer = theirs(tmp_path, dialogues)
    trainer.rollout_func = lambda prompts, _: fields
    with pytest.raises(InputError, match="one number per turn, got 2 for 3 turns"):
        batch_of(trainer)


def ragged(count=6):
    """Dialogues of one to three turns with rewards that differ, one of them unknown."""
    world = ScriptedWorld(turns=lambda seed: 1 + seed % 3)
    rollout = Rollout(
        tiny_model(tokenizer := tiny_tokenizer()),
        tokenizer,
        RolloutConfig(max_new_tokens=6, dtype="float32"),
    )
    dialogues = rollout.run(world, tasks(count))
    for i, dialogue in enumerate(dialogues):
        for k, turn in enumerate(dialogue.turns):
            turn.reward = float((7 * i + 3 * k) % 5)
    dialogues[2].turns[1].reward = math.nan
    return dialogues


def plain_trainer(folder, dialogues, **changes):
    world = ScriptedWorld()
    world.tasks = lambda split: ["a", "b", "c"]
    trainer = theirs(folder, world=world, **changes)
    trainer.rollout_func = Scored(dialogues)
    return trainer


ACROSS = ("mapo", "reinforce++")
WORKER = """
import os, sys
from safetensors.torch import save_file
from tests.integrations.test_trl import ACROSS, batch_of, plain_trainer, ragged
rank = int(os.environ["RANK"])
mine = ragged()[3 * rank : 3 * rank + 3]
for name in ACROSS:
    trainer = plain_trainer(
        sys.argv[1], mine, per_device_train_batch_size=3, num_generations=2, estimator=name
    )
    output = batch_of(trainer)
    fields = ("advantages", "completion_mask", "tool_mask")
    save_file({n: output[n].contiguous() for n in fields}, f"{sys.argv[1]}/{name}-{rank}")
trainer.accelerator.wait_for_everyone()
os._exit(0)  # all is saved; threads of gloo may abort the interpreter's own way out
"""


@pytest.mark.slow
def test_a_group_may_straddle_two_processes(tmp_path):
    """Three groups of two dialogues over two processes: the second is in both."""
    root = Path(__file__).parents[2]
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, *launch, str(tmp_path)]
    subprocess.run(command, env=environment, cwd=root, check=True, timeout=300)
    table = turn_table(dialogues := ragged())
    rows = (table.reward, table.dialogue, table.turn)
    lengths = torch.tensor([len(turn.token_ids) for d in dialogues for turn in d.turns])
    for name in ACROSS:
        expected = estimate(name, *rows, table.dialogue // 2)
        parted = table.dialogue // 2 + 3 * (table.dialogue // 3)
        assert name != "mapo" or not torch.allclose(estimate(name, *rows, parted), expected)
        found = []
        for rank in range(2):
            output = load_file(tmp_path / f"{name}-{rank}")
            mask = (output["completion_mask"] * output["tool_mask"]).bool()
            found.append(output["advantages"][mask])
            assert not bool(output["advantages"][~mask].any())
        torch.testing.assert_close(
            torch.cat(found).double(), expected.repeat_interleave(lengths), atol=1e-6, rtol=1e-6
        )


@pytest.mark.slow
@pytest.mark.model
def test_smollm2_trains_in_the_emotional_support_world(tmp_path):
    from normkit.recipes.mapo import Config, make_environment
    from normkit.rl.models import load_policy

    model, tokenizer = load_policy("smollm2")
    world = make_environment(Config(max_turns=2), tmp_path)
    trainer = integration.MAPOTrainer(
        model,
        world,
        args=arguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=2,
            num_generations=2,
            max_completion_length=8,
            learning_rate=1e-5,
        ),
        processing_class=tokenizer,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    assert all(0 < row["grad_norm"] < math.inf and row["score"] > 0 for row in rows)


@pytest.mark.parametrize("through_trl", [False, True])
def test_it_plays_a_world_and_trains(tmp_path, through_trl):
    world = make().environment
    trainer = theirs(tmp_path, kind=integration.MAPOTrainer, world=world, max_steps=3)
    trainer.rollout_func.through_trl = through_trl
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["score"]) for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("through_trl", [False, True])
def test_rollouts_are_what_the_model_says(tmp_path, through_trl):
    """Ragged dialogues, side by side, told apart token by token."""
    world = ScriptedWorld(max_turns=4, turns=lambda seed: 1 + seed % 4)
    world.tasks = lambda split: ["a", "b"]
    trainer = theirs(tmp_path, world=world)
    asked = [("a", 0, 4), ("a", 0, 5), ("b", 1, 6), ("b", 1, 7)]
    if through_trl:
        dialogues = integration._play_rounds(world, asked, trainer)
    else:
        config = RolloutConfig(max_new_tokens=12, dtype="float32")
        dialogues = integration.WorldRollout(world, config)._play(asked, trainer)
    assert [len(d.turns) for d in dialogues] == [1, 2, 3, 4]
    for dialogue in dialogues:
        assert dialogue.scores == {"score": float(len(dialogue.turns))}
        if through_trl:  # TRL's plain generation reports no probabilities
            spans = dialogue.segments[0].spans
            ids = dialogue.segments[0].token_ids
            assert [ids[a:b] for _, a, b in spans] == [t.token_ids for t in dialogue.turns]
        else:
            check_dialogue(dialogue, trainer.model.eval())
    fields = integration.completions(dialogues)
    for dialogue, prompt, completion, mask in zip(
        dialogues, fields["prompt_ids"], fields["completion_ids"], fields["env_mask"], strict=True
    ):
        assert prompt + completion == dialogue.segments[0].token_ids
        said = [t for t, m in zip(completion, mask, strict=True) if m]
        assert said == [t for turn in dialogue.turns for t in turn.token_ids]


@pytest.mark.parametrize("through_trl", [False, True])
def test_a_world_may_pay_earlier_turns_anew(tmp_path, through_trl):
    world = LateWorld(turns=lambda seed: 1 + seed % 3)
    world.tasks = lambda split: ["a", "b"]
    trainer = theirs(tmp_path, world=world)
    trainer.rollout_func.through_trl = through_trl
    paid = trainer.rollout_func(["a"] * 6, trainer)["turn_rewards"]
    assert paid == [[10.0 * len(row) + k for k in range(len(row))] for row in paid]
    assert max(map(len, paid)) > 1


def test_generation_keeps_its_cache_whatever_wraps_the_model(tmp_path, caplog):
    trainer = theirs(tmp_path, world=make().environment)
    wrapped = trainer.model.forward
    trainer.rollout_func._play([("career-0", 0, 1)], trainer)
    assert "encoded anew" not in caplog.text
    assert trainer.model.forward is wrapped


def test_rounds_end_where_there_is_no_room(tmp_path):
    world = ScriptedWorld(max_turns=200, say=lambda *_: "word " * 20)
    world.tasks = lambda split: ["a", "b"]
    trainer = theirs(tmp_path, world=world)
    (dialogue,) = integration._play_rounds(world, [("a", 0, 0)], trainer)
    assert dialogue.end_reason == "context"
    longest = trainer.model.config.max_position_embeddings
    assert longest - 200 < len(dialogue.segments[0].token_ids) <= longest


def test_seats_of_a_game_are_credited_as_by_our_trainer(tmp_path):
    """Games of one to six replies between two seats; the second may never have its turn."""
    world = Relay(seats=2, length=lambda seed: 1 + seed % 6)
    trainer = theirs(
        tmp_path, world=world, estimator="mars", per_device_train_batch_size=8, num_generations=8
    )
    kept = []
    played_by = trainer.rollout_func._play
    trainer.rollout_func._play = lambda *args: kept.extend(played_by(*args)) or kept
    output = batch_of(trainer)
    assert [d.agent for d in kept] == [0, 1] * 4
    assert not all(d.turns for d in kept)
    table = turn_table(kept)
    rows = (table.reward, table.dialogue, table.turn, torch.zeros_like(table.group))
    expected = estimate("mars", *rows, agent=table.agent)
    mask = (output["completion_mask"] * output["tool_mask"]).bool()
    lengths = torch.tensor([len(turn.token_ids) for d in kept for turn in d.turns])
    torch.testing.assert_close(
        output["advantages"][mask].double(),
        expected.repeat_interleave(lengths),
        atol=1e-4,
        rtol=1e-6,
    )
    assert not bool(output["advantages"][~mask].any())


def test_seats_that_do_not_fill_a_group_are_refused(tmp_path):
    trainer = theirs(tmp_path, world=Relay(seats=2), num_generations=6)
    with pytest.raises(InputError, match="multiple of the 2 seats"):
        trainer.rollout_func(["relay"] * 3, trainer)
    trainer.rollout_func.through_trl = True
    with pytest.raises(InputError, match="cannot play one with seats"):
        trainer.rollout_func(["relay"] * 2, trainer)


def test_a_dialogue_that_outgrew_its_context_is_refused():
    _, dialogues = played()
    dialogues[0].segments.append(dialogues[0].segments[0])
    with pytest.raises(InputError, match="outgrew max_context"):
        integration.completions(dialogues)


def test_generation_of_the_wrong_temperature_is_refused(tmp_path):
    trainer = theirs(tmp_path, world=make().environment, temperature=0.7)
    trainer.rollout_func.config = RolloutConfig(max_new_tokens=12)
    with pytest.raises(InputError, match=r"that of args \(0.7\), got 1.0"):
        trainer.rollout_func(["career-0"], trainer)
    trainer.rollout_func.through_trl = True
    with pytest.raises(InputError, match="must be None where TRL generates"):
        trainer.rollout_func(["career-0"], trainer)


def test_fewer_tasks_than_a_step_takes_are_refused(tmp_path):
    world = ScriptedWorld()
    world.tasks = lambda split: ["a"]
    with pytest.raises(InputError, match="one step takes 2 tasks, and environment has 1"):
        theirs(tmp_path, world=world)


def test_a_world_excludes_what_it_supplies(tmp_path):
    tokenizer = tiny_tokenizer()
    with pytest.raises(InputError, match="rollout_func must not be given"):
        integration.TurnAdvantageTrainer(
            tiny_model(tokenizer),
            make().environment,
            args=arguments(tmp_path),
            processing_class=tokenizer,
            rollout_func=lambda prompts, trainer: {},
        )
    with pytest.raises(InputError, match="needs a critic"):
        theirs(tmp_path, [], estimator="ppo")


def test_without_trl_the_import_says_what_to_install():
    script = (
        "import sys; sys.modules['trl'] = None\n"
        "from normkit.errors import MissingDependencyError\n"
        "try:\n    import normkit.integrations.trl\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert "pip install 'normkit[trl]'" in found.stdout, found.stderr
