"""The training loop on a tiny model: learning, exactness, resuming, bad days."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from normkit.errors import InputError
from normkit.rl import checkpoint as checkpoints
from normkit.rl.checkpoint import load_checkpoint, save_checkpoint
from normkit.rl.dialogue import micro_batches, pack, turn_table
from normkit.rl.environments.empathy import EmpathyConfig, EmpathyEnvironment
from normkit.rl.environments.epm import EPMConfig
from normkit.rl.judge import Failed, JudgeUnavailableError
from normkit.rl.loss import PolicyLossConfig
from normkit.rl.policy import collate, token_logprobs
from normkit.rl.rollout import RolloutConfig
from normkit.rl.trainer import Trainer, TrainerConfig
from normkit.runs import RunLogger, read_table
from tests.rl.fakes import filled, scenario
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
        TrainerConfig(autocast="float32", checkpoint_every=2, **options),
        RolloutConfig(max_new_tokens=new_tokens, dtype="float32"),
        loss,
        None if folder is None else RunLogger(folder, tensorboard=False),
    )


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


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_resumed_run_gives_the_same_numbers(tmp_path, lora_rank):
    whole = make(tmp_path / "a", lora_rank=lora_rank)
    whole.train()
    first = make(tmp_path / "b", lora_rank=lora_rank)
    for _ in range(2):
        first.train_step()
    first.save(tmp_path / "checkpoint")
    first.train_step()  # newer than the checkpoint: forgotten on resuming
    second = make(tmp_path / "b", lora_rank=lora_rank)
    second.resume(tmp_path / "checkpoint")
    second.train()
    rows = [without_times(read_table(tmp_path / name)) for name in "ab"]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4]


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


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = make()
    trainer.train_step()
    trainer.save(tmp_path / "checkpoint")
    before = {p.name: p.read_bytes() for p in (tmp_path / "checkpoint").iterdir()}
    trainer.train_step()

    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save(tmp_path / "checkpoint")
    assert {p.name: p.read_bytes() for p in (tmp_path / "checkpoint").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_checkpoints_of_other_models_are_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path / "c", model, optimizer, {"step": 1})
    assert load_checkpoint(tmp_path / "c", torch.nn.Linear(2, 2)) == {"step": 1}
    with pytest.raises(InputError, match="weight has shape"):
        load_checkpoint(tmp_path / "c", torch.nn.Linear(3, 2))
    with pytest.raises(InputError, match="names differ"):
        load_checkpoint(tmp_path / "c", torch.nn.Linear(2, 2, bias=False))
    (tmp_path / "c" / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match=r"optimizer\.safetensors is missing"):
        load_checkpoint(tmp_path / "c", model)


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
    assert (trainer.reference is None) == bool(lora_rank)


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
torch.set_num_threads(1)
from tests.rl.test_trainer import make
trainer = make(steps=2, groups=3)
for _ in range(2):
    trainer.train_step()
if trainer.accelerator.is_main_process:
    torch.save([p.detach() for p in trainer.model.parameters()], sys.argv[1])
trainer.accelerator.wait_for_everyone()
"""


@pytest.mark.slow
def test_two_processes_make_the_update_of_one(tmp_path):
    root = Path(__file__).parents[2]
    script = tmp_path / "worker.py"
    script.write_text(WORKERS)
    found = []
    for n in (1, 2):
        out = tmp_path / f"{n}.pt"
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={n}", "--master_port=0"]
        command = [sys.executable, *launch, "--standalone", str(script), str(out)]
        environment["ACCELERATE_USE_CPU"] = "true"
        subprocess.run(command, env=environment, cwd=root, check=True, timeout=200)
        found.append(torch.load(out, weights_only=True))
    start = list(tiny_model(tiny_tokenizer()).parameters())
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(found[0], start, strict=True))
    assert moved > 1e-3
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"estimator": "nope"}, "estimator must be one of"),
        ({"estimator": "ppo"}, "critic"),
        ({"mini_batches": 17}, "mini_batches"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(InputError, match=words):
        TrainerConfig(**options)
