"""The update with a critic and with the clipping-bias correction, on a tiny model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from normkit.errors import InputError
from normkit.rl import policy, update
from normkit.rl.checkpoint import load_checkpoint
from normkit.rl.critic import CriticConfig
from normkit.rl.loss import PolicyLossConfig
from normkit.rl.presets import METHODS, preset
from normkit.runs import read_table
from tests.rl.test_trainer import make, weights
from tests.rl.tiny import tiny_model, tiny_tokenizer

TIGHT = PolicyLossConfig(ratio="turn", clip_low=0.001, clip_high=0.001, dual_clip=0)
"""Clips much on the second update of a batch."""
LEVELS = ["turn", "token"]
CONTEXT = 250
"""Tokens that the tiny world's dialogues outgrow."""


def gradients(trainer):
    """Gradients that each update steps with, from now on."""
    seen = []
    step = trainer.learner.optimizer.step

    def watched():
        seen.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
        step()

    trainer.learner.optimizer.step = watched
    return seen


def sampled(trainer):
    return trainer.rollout.run(trainer.environment, trainer.schedule(0))


@pytest.mark.parametrize("level", LEVELS)
def test_the_critic_learns_the_returns_and_leaves_the_policy_alone(level):
    critic = CriticConfig(level, weight=1.0, clip=0.0, detach=True, learning_rate=0.3)
    options = {"gamma": 1.0, "lam": 1.0}
    trainer = make(
        estimator="ppo", estimator_options=options, critic=critic, learning_rate=0.0, epochs=10
    )
    before = weights(trainer)
    dialogues = sampled(trainer)
    numbers = [trainer.update(dialogues) for _ in range(4)]
    explained = [n["explained_variance"] for n in numbers]
    assert explained[0] == 0
    assert explained[-1] > 0.05
    assert numbers[-1]["value_loss"] < 0.5 * numbers[0]["updates"][0]["value_loss"]
    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize("detach", [False, True])
def test_the_value_loss_trains_the_trunk_unless_it_is_detached(detach):
    found = []
    for weight in (0.0, 1.0):
        critic = CriticConfig("token", weight=weight, detach=detach)
        trainer = make(estimator="ppo", critic=critic, max_grad_norm=1e9, epochs=2)
        seen = gradients(trainer)
        trainer.train_step()
        found.append(seen[1])  # the head is zero at first, and passes nothing on
    assert torch.equal(*found) == detach


@pytest.mark.parametrize("level", LEVELS)
def test_accumulation_changes_nothing(level):
    setup = {
        "estimator": "ppo",
        "critic": CriticConfig(level),
        "correction": "floor",
        "correction_floor": 1e-3,
        "epochs": 2,
        "loss": TIGHT,
    }
    whole, split = make(**setup).train_step(), make(**setup, micro_batch_tokens=1).train_step()
    assert whole["bias_norm"] > 1e-3
    for name in ("loss", "value_loss", "bias_norm", "grad_norm", "ratio_max", "clip_fraction"):
        assert whole[name] == pytest.approx(split[name], rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize(
    "setup",
    [
        {"loss": PolicyLossConfig(kl_weight=0.1, entropy_weight=0.1)},
        {"loss": PolicyLossConfig(kl_weight=0.1), "lora_rank": 2, "recompute": True},
        {"estimator": "ppo", "critic": CriticConfig("token", detach=False), "epochs": 2},
    ],
    ids=["reference", "lora", "critic"],
)
def test_an_update_on_trees_is_one_on_rows(monkeypatch, setup):
    on_trees, on_rows = make(**setup), make(**setup)
    dialogues = sampled(on_trees)
    found = on_trees.update(dialogues)
    for module in (policy, update):
        monkeypatch.setattr(module, "takes_trees", lambda _: False)
    expected = on_rows.update(dialogues)
    for name in ("loss", "grad_norm", "entropy", "sampling_kl"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


def test_a_ratio_of_dialogues_is_exact_where_they_outgrew_their_context():
    loss = PolicyLossConfig(ratio="sequence", clip_low=0.001, clip_high=0.001, dual_clip=0)
    setup = {"epochs": 2, "correction": "measure", "loss": loss}
    numbers = []
    for budget in (100_000, 1):
        trainer = make(**setup, micro_batch_tokens=budget)
        trainer.rollout.max_context = CONTEXT
        dialogues = sampled(trainer)
        assert max(len(d.segments) for d in dialogues) > 1
        numbers.append(trainer.update(dialogues))
    for name in ("loss", "bias_norm", "grad_norm", "ratio", "clip_fraction"):
        assert numbers[0][name] == pytest.approx(numbers[1][name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("recompute", [False, True])
def test_the_bias_is_what_clipping_takes_from_the_gradient_of_the_model(recompute):
    unclipped = PolicyLossConfig(ratio="turn", clip_low=0.999, clip_high=1e9, dual_clip=0)
    found, numbers = [], []
    for loss in (TIGHT, unclipped):
        # The first update is on-policy, and so the same whatever is clipped.
        trainer = make(
            epochs=2, loss=loss, correction="measure", max_grad_norm=1e9, recompute=recompute
        )
        seen = gradients(trainer)
        numbers.append(trainer.update(sampled(trainer))["updates"])
        found.append(seen[1])
        assert numbers[-1][0]["bias_norm"] == numbers[-1][0]["clip_fraction"] == 0
    (_, clipped), (_, free) = numbers
    assert clipped["bias_norm"] > 0.01
    assert free["bias_norm"] == 0
    lost = float((found[1] - found[0]).norm())
    assert clipped["bias_norm"] == pytest.approx(lost, rel=1e-3)


def test_the_correction_divides_the_gradients_before_they_are_clipped():
    setup = {"epochs": 2, "loss": TIGHT, "max_grad_norm": 1e9}
    plain, corrected = (
        make(**setup, correction=mode, correction_floor=1e-3) for mode in ("measure", "floor")
    )
    watched = [gradients(trainer) for trainer in (plain, corrected)]
    numbers = [trainer.update(sampled(trainer))["updates"] for trainer in (plain, corrected)]
    first, second = numbers[1]
    assert first["corrected_grad_norm"] == first["policy_grad_norm"] == first["grad_norm"]
    factor = second["bias_norm"] / 1e-3
    assert factor > 2
    assert second["corrected_grad_norm"] == pytest.approx(second["policy_grad_norm"] / factor)
    torch.testing.assert_close(watched[1][1] * factor, watched[0][1], rtol=1e-4, atol=1e-7)


def test_each_update_of_a_batch_is_logged_with_its_staleness(tmp_path):
    trainer = make(tmp_path, epochs=2, mini_batches=2, loss=TIGHT, correction="measure")
    for _ in range(2):
        summary = trainer.train_step()
    assert "updates" not in summary
    rows = read_table(tmp_path, "updates")
    assert [(row["step"], row["staleness"]) for row in rows] == [
        (step, update) for step in (1, 2) for update in range(4)
    ]
    assert rows[0]["ratio_max"] == pytest.approx(1, abs=1e-4)
    assert rows[1]["clip_fraction"] > rows[0]["clip_fraction"]
    assert summary["ratio_max"] == max(row["ratio_max"] for row in rows[4:])
    shares = [row["clip_fraction"] for row in rows[4:]]
    assert summary["clip_fraction"] == pytest.approx(sum(shares) / 4)
    once = tmp_path / "once"
    make(once).train_step()
    assert read_table(once, "updates") == []


def test_an_update_that_is_skipped_makes_nothing_staler():
    trainer = make(epochs=3)
    clip = trainer.engine.clip_gradients
    calls = []

    def failing(parameters, norm):
        calls.append(1)
        return torch.tensor(float("nan")) if len(calls) == 2 else clip(parameters, norm)

    trainer.engine.clip_gradients = failing
    updates = trainer.update(sampled(trainer))["updates"]
    assert [u["staleness"] for u in updates] == [0, 1, 1]


@pytest.mark.parametrize("silent", [1, 5, 6])
def test_dialogues_without_a_turn_take_no_part(silent):
    """Seats whose game was over before their turn came."""
    trainer = make(estimator="ppo", critic=CriticConfig("token"), mini_batches=4)
    dialogues = sampled(trainer)
    for dialogue in dialogues[:silent]:
        dialogue.turns, dialogue.segments = [], []
    before = weights(trainer)
    updates = trainer.update(dialogues)["updates"]
    assert len(updates) == 4
    assert all(update["grad_norm"] > 0 for update in updates[: 6 - silent])
    assert torch.equal(weights(trainer), before) == (silent == 6)


def test_the_cap_on_sampling_weights_scales_advantages():
    losses = {}
    for cap in (0.0, 0.25):
        trainer = make(loss=PolicyLossConfig(sampling_cap=cap))
        losses[cap] = trainer.update(sampled(trainer))["loss"]
    # Trainer and sampler agree here, so that every weight is the smaller of 1 and the cap.
    assert losses[0.25] == pytest.approx(0.25 * losses[0.0], rel=1e-3)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_critic_stays_out_of_the_export_and_out_of_the_way_of_the_model(tmp_path, lora_rank):
    trainer = make(estimator="ppo", lora_rank=lora_rank)
    trainer.train_step()
    trainer.save_hf(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert plain.state_dict().keys() == tiny_model(tiny_tokenizer()).state_dict().keys()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, trainer.model(ids).logits)
    trainer.save(tmp_path / "checkpoint")
    other = make(lora_rank=lora_rank)
    load_checkpoint(tmp_path / "checkpoint", other.model)
    torch.testing.assert_close(weights(other), weights(trainer))


def test_a_checkpoint_without_a_critic_does_not_resume_one(tmp_path):
    trainer = make()
    trainer.train_step()
    trainer.save(tmp_path / "checkpoint")
    with pytest.raises(InputError, match=r"critic\.safetensors is missing"):
        make(estimator="ppo").resume(tmp_path / "checkpoint")


@pytest.mark.parametrize("name", [*METHODS, "so-ppo"])
def test_the_methods_train_by_name(name):
    config, loss = preset(name, epochs=2)
    chosen = {
        field: getattr(config, field)
        for field in ("estimator", "estimator_options", "critic", "correction", "epochs")
    }
    trainer = make(loss=loss, **chosen)
    numbers = trainer.train_step()
    assert numbers["grad_norm"] > 0
    assert (trainer.learner.critic is None) == ("grpo" in name)
    assert ("explained_variance" in numbers) == ("grpo" not in name)
    assert config.correction == ("floor" if name.startswith("s") else "measure")
    assert loss.ratio == (
        "turn" if name in ("turn-ppo", "st-ppo", "so-ppo", "so-grpo") else "token"
    )


def test_a_preset_takes_other_options_and_names_unknown_methods():
    config, _ = preset("st-ppo", steps=3, correction="ratio")
    assert (config.steps, config.correction) == (3, "ratio")
    with pytest.raises(InputError, match="preset must be one of ppo, turn-ppo"):
        preset("sst-ppo")
