"""Run by a Python that has verl: its own compute_advantage against our estimators, row by row."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path

import hydra
import numpy as np
import torch
import verl
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.workers.config.actor import ActorConfig
from verl.workers.rollout.replica import TokenOutput

from normkit.errors import InputError, NormkitError
from normkit.integrations.verl import (
    REGISTERED,
    credit_turns_by_gae,
    register,
    turn_gae_advantage,
)
from normkit.integrations.verl_agent import WorldAgentLoop
from normkit.integrations.verl_loss import TURN_PPO, verl_turn_loss
from normkit.rl.advantage import ESTIMATORS, estimate, to_tokens
from normkit.rl.token_grid import grid_turns
from tests.rl.talk import LateWorld, ScriptedWorld
from tests.rl.tiny import tiny_model, tiny_tokenizer


def batch(seed):
    """Ragged turns in verl's layout, and the same as rows."""
    draw = np.random.default_rng(seed)
    size, length = 12, 60
    mask = torch.zeros(size, length, dtype=torch.int64)
    reward, turn_row, rows = torch.zeros(size, length), torch.full((size, length), -1), []
    for b in range(size):
        at = 0
        for t in range(int(draw.integers(1, 6))):
            stop = at + int(draw.integers(1, 6))
            mask[b, at:stop] = 1
            turn_row[b, at:stop] = len(rows)
            value = float(np.float32(draw.normal()))
            reward[b, int(draw.integers(at, stop))] = value
            rows.append((value, b, t, b // 4))
            at = stop + int(draw.integers(1, 5))
    columns = list(zip(*rows, strict=True))
    flat = (torch.tensor(columns[0], dtype=torch.float64), *map(torch.tensor, columns[1:]))
    uid = np.array([f"prompt-{b // 4}" for b in range(size)], dtype=object)
    data = DataProto.from_dict(
        tensors={"token_level_rewards": reward, "response_mask": mask}, non_tensors={"uid": uid}
    )
    return data, flat, turn_row


def main():
    assert register() == tuple(REGISTERED)  # a second time, after the plugin's
    config = OmegaConf.create({"gamma": 0.9, "normkit": {}})
    OmegaConf.set_struct(config, True)
    worst = 0.0
    for name, function in REGISTERED.items():
        assert core_algos.get_adv_estimator_fn(name) is function
        ours = ESTIMATORS[function.args[0]]
        if ours.needs:
            refused(name, config)
            continue
        options = {"gamma": 0.9} if "gamma" in ours.options else {}
        for seed in range(20):
            data, flat, turn_row = batch(seed)
            found = compute_advantage(data, adv_estimator=name, gamma=0.9, config=config)
            expected = to_tokens(estimate(ours.name, *flat, **options), turn_row)
            worst = max(worst, float((found.batch["advantages"] - expected).abs().max()))
    assert worst < 1e-5, worst
    credited_by_turns(config)
    losses()
    played()
    together()
    example = Path(__file__).parents[2] / "examples" / "verl_mapo.yaml"
    compose(example)
    print(f"verl {verl.__version__}: {len(REGISTERED)} estimators, largest difference {worst:.1e}")


def refused(name, config):
    """Without a critic's values verl cannot credit by it; the error says what to set."""
    said = ""
    try:
        compute_advantage(batch(0)[0], adv_estimator=name, gamma=0.9, config=config)
    except InputError as error:
        said = str(error)
    assert "verl_turn_gae" in said


def credited_by_turns(config):
    """verl's "gae" before and after its function is replaced."""
    data, flat, turn_row = batch(0)
    rows = torch.nonzero(turn_row >= 0)
    alone = turn_row.clone()  # every token a turn of its own, and every other one the user's
    alone[:, 1::2] = -1
    single = DataProto.from_dict(
        tensors={
            "token_level_rewards": data.batch["token_level_rewards"] * (alone >= 0),
            "response_mask": (alone >= 0).long(),
            "values": torch.randn(alone.shape, generator=torch.Generator().manual_seed(1)),
        }
    )
    options = {"adv_estimator": "gae", "gamma": 0.9, "lam": 0.8, "config": config}
    theirs = compute_advantage(single[:], **options).batch
    import_module("normkit.integrations.verl_turn_gae")
    credit_turns_by_gae()  # a second time
    assert core_algos.compute_gae_advantage_return is turn_gae_advantage
    ours = compute_advantage(single[:], **options).batch
    there = alone >= 0
    for name, tolerance in (("returns", 1e-5), ("advantages", 1e-2)):  # verl's variance is unbiased
        torch.testing.assert_close(
            ours[name][there], theirs[name][there], atol=tolerance, rtol=tolerance
        )
    values = torch.randn(turn_row.shape, generator=torch.Generator().manual_seed(2))
    data.batch["values"] = values
    found = compute_advantage(data, **options).batch
    first = {int(turn_row[b, k]): float(values[b, k]) for b, k in rows.flip(0).tolist()}
    before = torch.tensor([first[n] for n in range(len(first))], dtype=torch.float64)
    for name, whiten in (("advantages", True), ("returns", False)):
        expected = estimate("ppo", *flat, value=before, gamma=0.9, lam=0.8, whiten=whiten)
        expected = to_tokens(expected if whiten else expected + before, turn_row)
        torch.testing.assert_close(found[name].double(), expected, atol=1e-5, rtol=1e-5)


def losses():
    """Turn-PPO beside verl's PPO (turns of one token) and GSPO (one turn a response)."""
    assert core_algos.get_policy_loss_fn(TURN_PPO) is verl_turn_loss
    info = {"dp_size": 2, "batch_num_tokens": 300, "global_batch_size": 16, "loss_scale_factor": 9}
    single = torch.arange(60).remainder(2) == 0
    whole = torch.arange(60) < torch.arange(5, 53, 4)[:, None]
    for name, mask in (("vanilla", single.expand(12, 60)), ("gspo", whole)):
        draw = torch.Generator().manual_seed(0)
        old, moved, advantage, trust = torch.randn(4, 12, 60, generator=draw)
        new = (old + 0.3 * (moved + moved[:, :1])).requires_grad_()
        if name == "gspo":  # it credits each token with its own advantage, Turn-PPO with the mean
            advantage, trust = advantage[:, :1].expand(12, 60), torch.ones(12, 60)
        # verl's GSPO has no dual clip.
        dual = 3.0 if name == "vanilla" else 1e6
        for mode in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"):
            config = ActorConfig(
                strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_c=dual
            )
            config.global_batch_info.update(info)
            rows = (old, new, advantage, mask, mode, config, trust.abs())
            found, numbers = core_algos.get_policy_loss_fn(TURN_PPO)(*rows)
            expected, theirs = core_algos.get_policy_loss_fn(name)(*rows)
            torch.testing.assert_close(found, expected)
            gradients = [torch.autograd.grad(x, new)[0] for x in (found, expected)]
            torch.testing.assert_close(*gradients)
            assert numbers["actor/pg_clipfrac"] > 0
            if mode == "token-mean":
                both = sum(theirs[f"actor/pg_clipfrac{which}"] for which in ("", "_lower"))
                assert abs(numbers["actor/pg_clipfrac"] - both) < 1e-6


class Server:
    """Stands for vLLM: replies of three plain letters and the end-of-turn token."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.prompts = []

    async def generate(self, request_id, prompt_ids, sampling_params):
        self.prompts.append(list(prompt_ids))
        text = "abc"[: 1 + len(self.prompts) % 3]
        ids = [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]
        ids = ids[: sampling_params["max_tokens"]]
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids))


def make_world():
    return ScriptedWorld(max_turns=3)


def make_late_world():
    return LateWorld(max_turns=3)


class BatchedWorld(ScriptedWorld):
    """Remembers the size of its batches and the thread that it was asked in; fails on demand."""

    def __init__(self):
        super().__init__(max_turns=3)
        self.made, self.sizes, self.threads = threading.get_ident(), [], set()

    def step(self, sessions, replies):
        time.sleep(0.01)
        self.sizes.append(len(sessions))
        self.threads.add(threading.get_ident())
        if any(session.task == "broken" for session in sessions):
            raise NormkitError("the judge is gone")
        return super().step(sessions, replies)


def start(world, room, server):
    settings = {"actor_rollout_ref": {"rollout": {"response_length": room, "prompt_length": 200}}}
    return WorldAgentLoop(
        trainer_config=DictConfigWrap(OmegaConf.create(settings)),
        server_manager=server,
        tokenizer=server.tokenizer,
        processor=None,
        dataset_cls=None,
        data_config=DictConfigWrap(OmegaConf.create({})),
        environment=f"{__name__}:{world}",
        max_new_tokens=8,
    )


def example(task, number=0):
    return {"extra_info": {"task": task}, "uid": "u", "session_id": number}


def played():
    """A dialogue of our agent loop: one row that holds what was said, and its rewards by turn."""

    async def play(room, world="make_world"):
        server = Server(tiny_tokenizer())
        return server, await start(world, room, server).run({"logprobs": True}, **example("talk"))

    server, output = asyncio.run(play(400))
    fields = output.as_dict()
    row = fields["prompts"].tolist() + fields["responses"].tolist()
    assert all(row[: len(prompt)] == prompt for prompt in server.prompts)
    turns = grid_turns(fields["rm_scores"][None], fields["response_mask"][None])
    assert turns.reward.tolist() == [1.0, 2.0, 3.0], turns.reward
    assert output.reward_score == 6.0
    assert len(server.prompts) == 3
    assert (fields["rollout_log_probs"] != 0).tolist() == fields["response_mask"].bool().tolist()
    assert fields["extra_fields"]["reward_extra_info"] == {"score": 3.0}
    _, short = asyncio.run(play(20))
    assert len(short.response_ids) <= 20
    assert len(short.turn_rewards) < 3
    _, late = asyncio.run(play(400, "make_late_world"))
    assert late.turn_rewards == [30.0, 31.0, 32.0]


def together():
    """Dialogues side by side: answered in one thread, several at once; a failure reaches each."""
    server = Server(tiny_tokenizer())

    async def play(names):
        loops = [start("BatchedWorld", 400, server) for _ in names]
        plays = [loops[i].run({}, **example(name, i)) for i, name in enumerate(names)]
        return loops[0].world, await asyncio.gather(*plays, return_exceptions=True)

    shared, outputs = asyncio.run(play(["talk"] * 8))
    assert [output.turn_rewards for output in outputs] == [[1.0, 2.0, 3.0]] * 8
    world = shared._world
    assert world.threads == {world.made} != {threading.get_ident()}
    assert sum(world.sizes) == 24
    assert max(world.sizes) > 2
    _, (lost,) = asyncio.run(play(["broken"]))
    assert isinstance(lost, NormkitError)
    _, (fine,) = asyncio.run(play(["talk"]))
    assert fine.turn_rewards == [1.0, 2.0, 3.0]
    _, (nameless,) = asyncio.run(play([None]))
    assert isinstance(nameless, InputError)
    server.generate = silent
    _, (unsaid,) = asyncio.run(play(["talk"]))
    assert isinstance(unsaid, NormkitError)


async def silent(request_id, prompt_ids, sampling_params):
    return TokenOutput(token_ids=[], log_probs=[])


PLUGIN = "ray_kwargs.ray_init.runtime_env.env_vars.VERL_USE_EXTERNAL_MODULES"
TURN_PPO_RUN = (
    f"{PLUGIN}=normkit.integrations.verl_turn_gae",
    "algorithm.adv_estimator=gae",
    "algorithm.gamma=1.0",
    "algorithm.lam=0.95",
    f"actor_rollout_ref.actor.policy_loss.loss_mode={TURN_PPO}",
    "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean",
)
"""What docs/guides/cluster.md adds to the example for Turn-PPO."""


def compose(example):
    """The example must be a configuration that verl's own files compose to and its checks pass."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tiny_tokenizer()
        tiny_model(tokenizer).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with initialize_config_dir(str(example.parent), version_base=None):
            model = f"actor_rollout_ref.model.path={folder}"
            config = hydra_compose(example.stem, [model])
            critic = f"critic.model.path={folder}"
            turn_ppo = hydra_compose(example.stem, [model, critic, *TURN_PPO_RUN])
        for one, with_critic in ((config, False), (turn_ppo, True)):
            assert need_critic(one) == with_critic
            validate_config(one, need_reference_policy(one), with_critic)
        assert OmegaConf.select(config, PLUGIN) == "normkit.integrations.verl_plugin"
        assert omega_conf_to_dataclass(turn_ppo.critic).loss_agg_mode == "seq-mean-token-mean"
    assert config.algorithm.adv_estimator in REGISTERED
    assert config.trainer.use_v1
    agents = OmegaConf.load(example.with_name("verl_agent.yaml"))
    named = config.actor_rollout_ref.rollout.agent
    assert agents[0].name == named.default_agent_loop
    assert (example.parents[1] / named.agent_loop_config_path).is_file()
    assert hydra.utils.get_class(agents[0]._target_) is WorldAgentLoop


if __name__ == "__main__":
    main()
