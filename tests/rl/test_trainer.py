"""The training loop on a tiny model: learning, exactness, resuming, bad days."""

from __future__ import annotations

import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from normkit.errors import InputError
from normkit.rl.checkpoint import load_checkpoint, save_checkpoint
from normkit.rl.critic import CriticConfig
from normkit.rl.dialogue import PackedRow, micro_batches, pack, turn_table
from normkit.rl.environments.empathy import EmpathyConfig, EmpathyEnvironment
from normkit.rl.environments.epm import EPMConfig
from normkit.rl.judge import Failed, JudgeUnavailableError
from normkit.rl.loss import PolicyLossConfig
from normkit.rl.policy import collate, token_logprobs
from normkit.rl.rollout import RolloutConfig
from normkit.rl.trainer import Trainer, TrainerConfig
from normkit.runs import RunLogger, read_table
from tests.rl.fakes import filled, scenario
from tests.rl.talk import ScriptedWorld
from tests.rl.tiny import tiny_model, tiny_tokenizer

TIMES = ("seconds", "per_second")


class PlainJudge:
    """Progress for replies in plain ASCII; fails on request."""

    name = "plain"

    def __init__(self, fail_on=(), fail_all_after=None):
        self.calls = 0
        self.fail_on, self.fail_all_after = fail_on, fail_all_after

    def judge(self, requests):
        self.calls += 1
        if self.fail_all_after is not None and self.calls > self.fail_all_after:
            return [Failed("the server is down")] * len(requests)
        verdicts = []
        for i, request in enumerate(requests):
            share = sum(c.isascii() for c in request.reply) / max(len(request.reply), 1)
            level = min(2, int(3 * share))
            verdict = filled((level, 0), (level, 0), (0, 0 if request.reply else -1))
            verdicts.append(Failed("half a verdict") if i in self.fail_on else verdict)
        return verdicts


def make(folder=None, judge=None, loss=None, new_tokens=12, **config):
    tokenizer = tiny_tokenizer()
    world = EmpathyEnvironment(
        [scenario(f"career-{i}", opening=f"Message {i}.") for i in range(3)],
        [scenario("career-held")],
        judge or PlainJudge(),
        None,
        EmpathyConfig(epm=EPMConfig(max_turns=3)),
    )
    options = {"steps": 4, "groups": 2, "group_size": 3, "learning_rate": 1e-2, **config}
    return Trainer(
        tiny_model(tokenizer),
        tokenizer,
        world,
        TrainerConfig(autocast="float32", **{"checkpoint_every": 2, **options}),
        RolloutConfig(max_new_tokens=new_tokens, dtype="float32"),
        loss,
        None if folder is None else RunLogger(folder, tensorboard=False),
    )


SETUPS = {
    "full": {},
    "lora-with-reference": {"lora_rank": 2, "loss": PolicyLossConfig(kl_weight=0.1)},
    "lora-with-critic": {"lora_rank": 2, "estimator": "ppo"},
    "st-ppo": {
        "estimator": "ppo",
        "critic": CriticConfig(level="token"),
        "correction": "floor",
        "correction_floor": 1e-3,
        "epochs": 2,
        "loss": PolicyLossConfig(ratio="turn", clip_low=0.01, clip_high=0.01, dual_clip=0),
    },
}


def without_times(rows):
    return [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in rows]


def test_packed_logprobs_are_those_of_sampling():
    trainer = make()
    dialogues = trainer.rollout.run(trainer.environment, trainer.schedule(0))
    batch = collate(pack(dialogues))
    logprob, entropy = token_logprobs(trainer.model, batch, entropy=True)
    torch.testing.assert_close(logprob, batch.logprob, atol=1e-4, rtol=1e-4)
    logits = trainer.model(batch.input_ids, attention_mask=batch.attention_mask).logits
    full = torch.log_softmax(logits, -1)[batch.row, batch.position - 1]
    torch.testing.assert_close(full.gather(1, batch.target[:, None])[:, 0], logprob)
    torch.testing.assert_close(-(full.exp() * full).sum(-1), entropy)
    sampled = sum(len(turn.token_ids) for d in dialogues for turn in d.turns)
    assert len(batch.target) == sampled
    table = turn_table(dialogues)
    assert set(batch.turn_row.tolist()) == set(range(len(table.reward)))


def test_micro_batches_cover_each_row_once_within_the_budget():
    trainer = make()
    rows = pack(trainer.rollout.run(trainer.environment, trainer.schedule(0)))
    for budget in (1, 200, 10_000):
        batches = micro_batches(rows, budget)
        assert sorted(i for b in batches for i in b) == list(range(len(rows)))
        for b in batches:
            assert len(b) == 1 or len(b) * max(len(rows[i].token_ids) for i in b) <= budget


def test_micro_batches_as_trees_bring_together_what_begins_alike():
    beginnings = [torch.full((40,), number) for number in range(3)]
    rows = []
    for i in range(12):
        ids = torch.cat([beginnings[i % 3], torch.arange(i, 2 * i + 10)])
        rows.append(PackedRow(ids, torch.zeros(len(ids)), torch.zeros(len(ids))))
    batches = micro_batches(rows, 150, trees=True)
    assert sorted(map(sorted, batches)) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert len(micro_batches(rows, 150)) == 6
    # Attention sees the padded rows: they stay within twice the budget.
    alike = [PackedRow(torch.zeros(50), torch.zeros(50), torch.zeros(50))] * 9
    assert [len(b) for b in micro_batches(alike, 100, trees=True)] == [4, 4, 1]


def test_micro_batches_do_not_separate_the_rows_of_a_unit():
    rows = [PackedRow(torch.zeros(n), torch.zeros(n), torch.zeros(n)) for n in (5, 9, 2, 7, 3)]
    unit = [0, 1, 0, 2, 2]
    assert micro_batches(rows, 1, unit) == [[1], [3, 4], [0, 2]]
    assert micro_batches(rows, 27, unit) == [[1, 3, 4], [0, 2]]
    assert micro_batches(rows, 45, unit) == [[1, 3, 4, 0, 2]]


@pytest.mark.parametrize("aggregate", ["token", "turn", "sequence"])
def test_accumulation_changes_nothing(aggregate):
    loss = PolicyLossConfig(aggregate=aggregate)
    whole, split = make(loss=loss), make(loss=loss, micro_batch_tokens=1)
    first, second = whole.train_step(), split.train_step()
    assert first["loss"] == pytest.approx(second["loss"], abs=1e-6)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_it_learns():
    trainer = make(steps=30, groups=2, group_size=6)
    before = trainer.train_step()["score"]
    trainer.train()
    late = [trainer.train_step()["score"] for _ in range(3)]
    assert sum(late) / 3 > before + 5


def test_masked_turns_train_nothing_and_are_counted():
    trainer = make(judge=PlainJudge(fail_on=(0, 3)))
    numbers = trainer.train_step()
    assert numbers["masked_turns"] == 6
    assert torch.isfinite(torch.tensor(numbers["loss"]))


def test_every_judge_failing_stops_and_keeps_the_steps_before(tmp_path):
    trainer = make(tmp_path, PlainJudge(fail_all_after=9))
    with pytest.raises(JudgeUnavailableError, match="the server is down"):
        trainer.train(tmp_path / "checkpoint")
    assert trainer.step == 3
    fresh = make()
    fresh.resume(tmp_path / "checkpoint")
    assert fresh.step == 3
    for a, b in zip(fresh.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", list(SETUPS))
def test_a_resumed_run_gives_the_same_numbers(tmp_path, kind):
    setup = SETUPS[kind]
    whole = make(tmp_path / "a", **setup)
    whole.train()
    first = make(tmp_path / "b", **setup)
    for _ in range(2):
        first.train_step()
    first.save(tmp_path / "checkpoint")
    first.train_step()  # newer than the checkpoint: forgotten on resuming
    second = make(tmp_path / "b", **setup)
    second.resume(tmp_path / "checkpoint")
    second.train()
    rows = [without_times(read_table(tmp_path / name)) for name in "ab"]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4]
    updates = [read_table(tmp_path / name, "updates") for name in "ab"]
    assert updates[0] == updates[1]
    assert same_weights(whole, second)


SCRIPT = """
import sys
from tests.rl.test_trainer import make
trainer = make(sys.argv[1], steps=40, judge=None)
if len(sys.argv) > 2:
    trainer.resume(sys.argv[1] + "/checkpoint")
    trainer.config = __import__("dataclasses").replace(trainer.config, steps=trainer.step + 3)
trainer.train(sys.argv[1] + "/checkpoint")
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", SCRIPT, str(tmp_path / "killed")]
    process = subprocess.Popen(run, env=environment, cwd=root)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed/checkpoint/state.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([*run, "resume"], env=environment, cwd=root, check=True, timeout=120)
    killed = without_times(read_table(tmp_path / "killed"))
    whole = make(tmp_path / "whole", steps=len(killed))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole.train()
    finally:
        torch.set_num_threads(threads)
    expected = without_times(read_table(tmp_path / "whole"))
    assert [row["step"] for row in killed] == [row["step"] for row in expected]
    for a, b in zip(killed, expected, strict=True):
        for key in ("loss", "reward", "grad_norm", "score"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (a["step"], key)


def same_weights(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True)
    )


def failing_at(calls, error):
    """A stand-in for a function that raises at its n-th call."""

    def wrap(function):
        seen = []

        def call(*args, **kwargs):
            seen.append(1)
            if len(seen) == calls:
                raise error
            return function(*args, **kwargs)

        return call

    return wrap


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_step_that_fails_before_its_update_saves_the_steps_before(tmp_path, error):
    trainer = make(tmp_path, checkpoint_every=0)
    trainer.train_step()
    trainer.rollout.run = failing_at(2, error)(trainer.rollout.run)
    with pytest.raises(type(error)):
        trainer.train(tmp_path / "checkpoint")
    fresh = make(checkpoint_every=0)
    fresh.resume(tmp_path / "checkpoint")
    assert fresh.step == 2
    assert same_weights(fresh, trainer)


def test_an_update_that_fails_half_way_is_never_saved(tmp_path):
    options = {"mini_batches": 3, "checkpoint_every": 2, "steps": 4}
    trainer = make(tmp_path / "run", **options)
    # Steps 1 to 3 make 9 updates; the second update of step 4 fails.
    trainer.learner._optimize = failing_at(11, RuntimeError("out of memory"))(
        trainer.learner._optimize
    )
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train(tmp_path / "checkpoint")
    resumed = make(tmp_path / "run", **options)
    resumed.resume(tmp_path / "checkpoint")
    assert resumed.step == 2
    assert not same_weights(resumed, trainer)
    resumed.train(tmp_path / "checkpoint")
    whole = make(tmp_path / "whole", **options)
    whole.train()
    assert same_weights(resumed, whole)
    rows = [without_times(read_table(tmp_path / name)) for name in ("run", "whole")]
    assert rows[0] == rows[1]


def test_a_step_draws_no_random_numbers_and_resuming_restores_them(tmp_path):
    trainer = make(lora_rank=2)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    trainer.train_step()
    assert torch.equal(torch.get_rng_state(), state)
    trainer.save(tmp_path / "checkpoint")
    torch.manual_seed(12)
    trainer.resume(tmp_path / "checkpoint")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def little_room():
    """A limit on the size of files: writes beyond it fail as on a full disk."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, request):
    trainer = make()
    trainer.train_step()
    trainer.save(tmp_path / "checkpoint")
    before = files_of(tmp_path / "checkpoint")
    trainer.train_step()
    request.getfixturevalue("little_room")
    with pytest.raises(OSError, match="File too large"):
        trainer.save(tmp_path / "checkpoint")
    assert files_of(tmp_path / "checkpoint") == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_full_disk_does_not_hide_why_a_step_failed(tmp_path, request):
    trainer = make(judge=PlainJudge(fail_all_after=3))
    request.getfixturevalue("little_room")
    with pytest.raises(JudgeUnavailableError):
        trainer.train(tmp_path / "checkpoint")
    assert trainer.step == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("keep", [0, 20, -1])
def test_broken_files_of_a_checkpoint_are_named(tmp_path, name, keep):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path, model, optimizer, {"step": 1})
    path = tmp_path / name
    path.write_bytes(path.read_bytes().rstrip()[:keep])
    with pytest.raises(InputError, match=re.escape(name)):
        load_checkpoint(tmp_path, model, optimizer)


def test_checkpoints_of_other_models_are_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path / "c", model, optimizer, {"step": 1})
    assert load_checkpoint(tmp_path / "c", torch.nn.Linear(2, 2)) == {"step": 1}
    with pytest.raises(InputError, match="weight has shape"):
        load_checkpoint(tmp_path / "c", torch.nn.Linear(3, 2))
    with pytest.raises(InputError, match="names differ"):
        load_checkpoint(tmp_path / "c", torch.nn.Linear(2, 2, bias=False))
    with pytest.raises(InputError, match="of another optimizer"):
        load_checkpoint(tmp_path / "c", model, torch.optim.AdamW([model.weight]))
    (tmp_path / "c" / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match=r"optimizer\.safetensors is missing"):
        load_checkpoint(tmp_path / "c", model)


class Paid:
    """Talks for as many turns as ``turns(seed)`` says and pays what ``reward(seed, turn)`` says."""

    max_turns = 12

    def __init__(self, reward, turns=lambda seed: 3):
        self.world = ScriptedWorld(self.max_turns, turns, lambda *_: "Go on.")
        self.reward = reward

    def tasks(self, split):
        return ["a", "b"]

    def start(self, task, seed):
        # Seeds of the trainer are large; the last digit decides.
        return self.world.start(task, seed % 10)

    def step(self, sessions, replies):
        steps = self.world.step(sessions, replies)
        return [
            replace(step, reward=self.reward(session.seed, len(session.replies)))
            for session, step in zip(sessions, steps, strict=True)
        ]

    def score(self, session):
        return self.world.score(session)


def paid(reward, turns=lambda seed: 3, rollout=None, **config):
    tokenizer = tiny_tokenizer()
    options = {"steps": 2, "groups": 2, "group_size": 3, "learning_rate": 1e-2, **config}
    return Trainer(
        tiny_model(tokenizer),
        tokenizer,
        Paid(reward, turns),
        TrainerConfig(autocast="float32", **options),
        RolloutConfig(**{"max_new_tokens": 5, "dtype": "float32", **(rollout or {})}),
    )


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rewards_that_are_not_finite_mask_their_turn(bad):
    trainer = paid(lambda seed, turn: bad if turn == 2 else float(seed + turn))
    before = weights(trainer)
    numbers = trainer.train_step()
    assert numbers["masked_turns"] == 6
    assert math.isfinite(numbers["reward"])
    assert math.isnan(numbers["reward_by_turn"][1])
    assert torch.isfinite(weights(trainer)).all()
    assert not torch.equal(weights(trainer), before)


def test_a_turn_without_a_verdict_counts_as_its_dialogues_mean_for_the_turns_before_it():
    trainer = paid(lambda seed, turn: math.nan if turn == 2 else float(seed * turn))
    table = turn_table(trainer.rollout.run(trainer.environment, trainer.schedule(0)))
    grid = table.reward.reshape(-1, 3)
    mean = grid.nanmean(1, keepdim=True)
    known = replace(table, reward=torch.where(grid.isnan(), mean, grid).flatten())
    first = table.turn == 0
    options = {"estimator": "turn", "estimator_options": {"gamma": 0.5}}
    trainer.learner.config = replace(trainer.config, **options)
    found, expected = trainer.learner.advantage(table), trainer.learner.advantage(known)
    assert found[first].any()
    torch.testing.assert_close(found[first], expected[first])
    assert not found[table.turn == 1].any()


def test_a_batch_without_any_reward_changes_nothing():
    trainer = paid(lambda seed, turn: float("nan"))
    before = weights(trainer)
    numbers = trainer.train_step()
    assert numbers["masked_turns"] == 18
    assert numbers["loss"] == 0
    assert torch.equal(weights(trainer), before)


def test_equal_rewards_change_nothing():
    # Without a discount, since with one even equal rewards make unequal returns.
    trainer = paid(lambda seed, turn: 0.7)
    before = weights(trainer)
    numbers = trainer.train_step()
    assert numbers["advantage_abs"] == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(weights(trainer), before)


def test_a_group_of_one_learns_from_its_turns():
    trainer = paid(lambda seed, turn: float(turn), groups=3, group_size=1)
    before = weights(trainer)
    numbers = trainer.train_step()
    # No other dialogue to compare with: half the z-scores of 1, 2, 3 remain.
    z = 1.5**0.5
    assert numbers["advantage_abs"] == pytest.approx(0.5 * (2 * z) / 3, abs=1e-6)
    assert torch.isfinite(weights(trainer)).all()
    assert not torch.equal(weights(trainer), before)


def test_a_dialogue_of_one_turn_trains_beside_one_of_twelve():
    def lone(seed):
        return 12 if seed % 2 else 1

    numbers = paid(lambda seed, turn: float(seed + turn), lone, groups=4).train_step()
    assert len(numbers["reward_by_turn"]) == 12
    assert all(math.isfinite(r) for r in numbers["reward_by_turn"])
    assert 1 < numbers["turns"] < 12
    assert math.isfinite(numbers["loss"])
    assert numbers["grad_norm"] > 0


def test_dialogues_that_outgrew_the_context_train_every_reply_once():
    rollout = {"max_context": 110}
    trainer = paid(lambda seed, turn: float(seed + turn), lambda seed: 9, rollout)
    dialogues = trainer.rollout.run(trainer.environment, trainer.schedule(0))
    assert all(len(d.segments) > 1 for d in dialogues)
    batch = collate(pack(dialogues))
    logprob, _ = token_logprobs(trainer.model, batch)
    torch.testing.assert_close(logprob, batch.logprob, atol=1e-4, rtol=1e-4)
    assert len(logprob) == sum(len(t.token_ids) for d in dialogues for t in d.turns)
    numbers = trainer.update(dialogues)
    assert numbers["sampling_kl"] == pytest.approx(0, abs=1e-6)
    assert numbers["grad_norm"] > 0


def test_entropy_is_reported_and_a_bonus_raises_it():
    plain = paid(lambda seed, turn: 0.7)
    entropy = plain.train_step()["entropy"]
    assert 0 < entropy < math.log(len(plain.tokenizer))
    # Equal rewards leave the bonus as the only thing to climb.
    bonus = PolicyLossConfig(entropy_weight=1.0)
    trainer = paid(lambda seed, turn: 0.7)
    trainer.learner.loss = bonus
    first = trainer.train_step()["entropy"]
    assert trainer.train_step()["entropy"] > first == pytest.approx(entropy)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_recomputing_activations_changes_nothing_but_memory(lora_rank):
    kept, again = (make(recompute=r, lora_rank=lora_rank) for r in (False, True))
    seen = []
    layer = next(m for m in again.model.modules() if type(m).__name__ == "LlamaDecoderLayer")
    layer.self_attn.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    first, second = kept.train_step(), again.train_step()
    assert seen.count(True) == 2
    assert "forward" not in vars(layer)
    for key in ("loss", "grad_norm", "entropy"):
        assert first[key] == pytest.approx(second[key], rel=1e-5, abs=1e-7)
    for a, b in zip(kept.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_held_out_tasks_are_scored_on_the_way_and_the_best_is_kept(tmp_path):
    whole = make(tmp_path / "a", evaluate_every=1)
    whole.train(tmp_path / "a/checkpoint", tmp_path / "a/best")
    rows = read_table(tmp_path / "a", "heldout")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    best = max(rows, key=lambda row: row["score"])  # the first of equals
    assert whole.best == {"step": best["step"], "score": best["score"]}
    kept = make(evaluate_every=1)
    kept.resume(tmp_path / "a/best")
    assert kept.step == best["step"]
    assert kept.best == whole.best
    first = make(tmp_path / "b", evaluate_every=1, steps=2)
    first.train(tmp_path / "b/checkpoint", tmp_path / "b/best")
    second = make(tmp_path / "b", evaluate_every=1)
    second.resume(tmp_path / "b/checkpoint")
    second.train(tmp_path / "b/checkpoint", tmp_path / "b/best")
    assert read_table(tmp_path / "b", "heldout") == rows
    assert second.best == whole.best


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule, expected):
    trainer = make(steps=3, mini_batches=2, warmup_steps=2, schedule=schedule, learning_rate=1.0)
    rates = []
    for trainer.step in range(3):
        rates += [trainer.learner.share(trainer.step, update) for update in range(2)]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_gradients_are_clipped_to_their_norm():
    trainer = make(max_grad_norm=1e-3)
    norms = []
    step = trainer.learner.optimizer.step

    def watched():
        grads = [p.grad for p in trainer.model.parameters()]
        norms.append(float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))))
        step()

    trainer.learner.optimizer.step = watched
    numbers = trainer.train_step()
    assert numbers["grad_norm"] > 1e-3
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_sample_dialogues_are_logged_with_their_step(tmp_path):
    trainer = make(tmp_path)
    trainer.train_step()
    rows = read_table(tmp_path, "dialogues")
    assert [row["step"] for row in rows] == [1, 1]
    assert all(set(turn) == {"message", "reply", "reward", "info"} for turn in rows[0]["turns"])


def test_nothing_of_normkit_pickles():
    # torch.load is safe with weights_only alone; gather_object and friends pickle too.
    forbidden = re.compile(
        r"^\s*(import|from) (pickle|dill|joblib|shelve|marshal)\b|torch\.(save|load)\(|"
        r"allow_pickle\s*=\s*True|gather_object|broadcast_object"
    )
    source = Path(__file__).parents[2] / "src" / "normkit"
    found = [
        f"{path.relative_to(source)}:{number}"
        for path in sorted(source.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if forbidden.search(line) and "weights_only=True" not in line
    ]
    assert found == []


def test_several_updates_per_batch_leave_the_sampling_policy():
    trainer = make(mini_batches=2, epochs=2, steps=1)
    numbers = trainer.train_step()
    assert numbers["kl_old"] > 0
    assert make(steps=1).train_step()["kl_old"] == 0


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_divergence_to_the_reference_starts_at_zero(lora_rank):
    trainer = make(loss=PolicyLossConfig(kl_weight=0.1), lora_rank=lora_rank)
    assert trainer.train_step()["kl"] == pytest.approx(0, abs=1e-6)
    assert trainer.train_step()["kl"] > 0
    assert (trainer.learner.reference is None) == bool(lora_rank)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_export_is_a_plain_model(tmp_path, lora_rank):
    trainer = make(lora_rank=lora_rank)
    trainer.train_step()
    trainer.train_step()
    trainer.save_hf(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trainer.model(ids).logits)
    trainer.train_step()


def test_greedy_evaluation_leaves_sampling_as_it_was():
    trainer = make()
    sampling = trainer.rollout.config
    first, second = (trainer.evaluate(seed=s) for s in (1, 2))
    assert [t.reply for t in first[0].turns][:1] == [t.reply for t in second[0].turns][:1]
    assert trainer.rollout.config == sampling


WORKERS = """
import sys, torch
from safetensors.torch import save_file
torch.set_num_threads(1)
from normkit.rl.checkpoint import trainable
from normkit.runs import leave
from tests.rl.test_trainer import SETUPS, make
# Small passes: the process with one group has fewer of them than the one with two.
trainer = make(sys.argv[1] + ".run", steps=2, groups=3, micro_batch_tokens=200,
               **SETUPS[sys.argv[2]])
for _ in range(2):
    trainer.train_step()
if trainer.engine.rank == 0:
    weights = trainable(trainer.model)
    if trainer.learner.critic is not None:
        weights.update(trainable(trainer.learner.critic))
    save_file({n: p.detach().contiguous() for n, p in weights.items()}, sys.argv[1])
trainer.engine.wait()
leave(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SETUPS))
def test_two_processes_make_the_update_of_one(tmp_path, kind):
    root = Path(__file__).parents[2]
    script = tmp_path / "worker.py"
    script.write_text(WORKERS)
    found, numbers = [], []
    for n in (1, 2):
        out = tmp_path / f"{n}.safetensors"
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--master_port=0"]
        command = [sys.executable, *launch, "--standalone", str(script), str(out), kind]
        environment["ACCELERATE_USE_CPU"] = "true"
        subprocess.run(command, env=environment, cwd=root, check=True, timeout=300)
        found.append(load_file(out))
        numbers.append(without_times(read_table(tmp_path / f"{n}.safetensors.run")))
    start = make(**SETUPS[kind]).model.state_dict()
    moved = [(w - start[name]).abs().max() for name, w in found[0].items() if name in start]
    assert float(max(moved)) > 1e-3
    assert found[0].keys() == found[1].keys()
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], atol=2e-5, rtol=1e-4)
    assert kind != "st-ppo" or numbers[0][0]["bias_norm"] > 1e-3
    for one, two in zip(*numbers, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"estimator": "nope"}, "estimator must be one of"),
        ({"estimator_options": {"gama": 1.0}}, "gama"),
        ({"micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0"),
        ({"schedule": "linear"}, "schedule must be constant or cosine"),
        ({"correction": "best"}, "correction must be None or one of floor"),
        ({"correction_floor": 0.0}, "correction_floor must be above 0"),
        ({"mini_batches": 17}, "mini_batches"),
        ({"evaluate_every": -1}, "evaluate_every must be at least 0"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(InputError, match=words):
        TrainerConfig(**options)
