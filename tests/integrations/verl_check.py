"""Run by a Python that has verl: its own compute_advantage against our estimators, row by row."""

from __future__ import annotations

import asyncio
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
from verl.workers.config.actor import ActorConfig
from verl.workers.rollout.replica import TokenOutput

from normkit.integrations.verl import REGISTERED, register
from normkit.integrations.verl_agent import WorldAgentLoop
from normkit.integrations.verl_loss import TURN_PPO, verl_turn_loss
from normkit.rl.advantage import ESTIMATORS, estimate, to_tokens
from normkit.rl.token_grid import grid_turns
from tests.rl.talk import ScriptedWorld
from tests.rl.tiny import tiny_tokenizer


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
        options = {"gamma": 0.9} if "gamma" in ours.options else {}
        for seed in range(20):
            data, flat, turn_row = batch(seed)
            found = compute_advantage(data, adv_estimator=name, gamma=0.9, config=config)
            expected = to_tokens(estimate(ours.name, *flat, **options), turn_row)
            worst = max(worst, float((found.batch["advantages"] - expected).abs().max()))
    assert worst < 1e-5, worst
    losses()
    played()
    example = Path(__file__).parents[2] / "examples" / "verl_mapo.yaml"
    compose(example)
    print(f"verl {verl.__version__}: {len(REGISTERED)} estimators, largest difference {worst:.1e}")


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


def played():
    """A dialogue of our agent loop: one row that holds what was said, and its rewards by turn."""
    tokenizer = tiny_tokenizer()
    settings = {"actor_rollout_ref": {"rollout": {"response_length": 400, "prompt_length": 200}}}

    async def play(room):
        settings["actor_rollout_ref"]["rollout"]["response_length"] = room
        server = Server(tokenizer)
        loop = WorldAgentLoop(
            trainer_config=DictConfigWrap(OmegaConf.create(settings)),
            server_manager=server,
            tokenizer=tokenizer,
            processor=None,
            dataset_cls=None,
            data_config=DictConfigWrap(OmegaConf.create({})),
            environment=f"{__name__}:make_world",
            max_new_tokens=8,
        )
        example = {"extra_info": {"task": "talk"}, "uid": "u", "session_id": 0}
        return server, await loop.run({"logprobs": True}, **example)

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


def compose(example):
    """The example must be a configuration that verl's own files compose to."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(example.parent), version_base=None):
        config = hydra_compose(example.stem)
    assert config.algorithm.adv_estimator in REGISTERED
    assert config.trainer.use_v1
    agents = OmegaConf.load(example.with_name("verl_agent.yaml"))
    named = config.actor_rollout_ref.rollout.agent
    assert agents[0].name == named.default_agent_loop
    assert (example.parents[1] / named.agent_loop_config_path).is_file()
    assert hydra.utils.get_class(agents[0]._target_) is WorldAgentLoop


if __name__ == "__main__":
    main()
