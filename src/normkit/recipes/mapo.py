"""MAPO: credit for the turns of a dialogue, normalized per turn and over the batch.

Mixed Advantage Policy Optimization for Long-Horizon Multi-Turn Dialogue (Zhang et al., 2026), arXiv
2603.06194; from its second version on titled MICA.

``A = alpha z(R over the group at the same turn) + (1 - alpha) z(r over all turns of the group)``.

Run it::

    normkit run mapo                                  # SmolLM2-135M, embedding judge, one laptop
    normkit run mapo --baseline grpo                  # the same budget with another estimator
    normkit run mapo --world tabular                  # all estimators, 32 seeds, exact advantages
    normkit run mapo --model Qwen/Qwen2.5-7B-Instruct --judge openai \
        --judge-url http://host:8000 --judge-model NAME --max-turns 15 --max-new-tokens 512

Differences from the authors' code: dialogues are short by default (a laptop's budget), the learning
rate is that of a 135M model, the world's texts are our own, and the statistics treat a turn that
one dialogue alone reached as having no advantage. See docs/papers/mapo.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normkit.errors import InputError
from normkit.files import check_new
from normkit.recipes._mapo_claims import CLAIMS
from normkit.recipes._mapo_heldout import MEASURED_LANGUAGE
from normkit.recipes._mapo_measured import MEASURED
from normkit.recipes.base import System, check_numbers, from_flags
from normkit.rl.advantage import get_estimator
from normkit.rl.environments.empa_cases import load_empa
from normkit.rl.environments.empathy import EmpathyConfig, EmpathyEnvironment
from normkit.rl.environments.epm import EPMConfig, RewardKind
from normkit.rl.environments.scenario import Scenario, builtin_scenarios, load_scenarios
from normkit.rl.loss import PolicyLossConfig
from normkit.rl.trainer_config import TrainerConfig

if TYPE_CHECKING:
    from normkit.rl.rollout import RolloutConfig

_MAPO_FAMILY = ("mapo", "turn", "batch", "batch-returns", "turn-baseline")
"""Estimators that share MAPO's options; others keep the defaults of their own papers."""


@dataclass(frozen=True)
class Config:
    """Flags of ``normkit run mapo``.

    Attributes:
        world: "empathy", a language model in emotional-support dialogues, or "tabular", all
            estimators in a small world whose exact advantages are known (of the other flags, it
            takes alpha, gamma, batch_scope and seed).
        model: "smollm2", or any chat model of transformers (a name or a folder).
        judge: what fills the rubric: "embedding", "llm" (local chat model) or "openai" (server).
        judge_model: the judge's model; for "llm" a name or folder, for "openai" the served name.
        judge_url: address of the OpenAI-compatible server.
        judge_timeout: seconds that one request to it may take; a server without a GPU needs more.
        scenarios: a scenario file of your own to train on; the last third is held out.
        empa: folder of your own copy of EMPA; its official cases are held out.
        baseline: another estimator under the same budget (see normkit.rl.advantage).
        alpha: weight of the turn-level term.
        gamma: discount per turn.
        batch_scope: pool of the batch-level term.
        reward: what a turn earns.
        steps: rollout-and-update rounds.
        groups: scenarios per step.
        group_size: dialogues per scenario.
        max_turns: a dialogue ends here.
        min_turns: neither success nor failure is declared earlier.
        max_new_tokens: length limit of a reply.
        temperature: of sampling; the policy that is trained is the one at this temperature.
        learning_rate: of AdamW.
        lora_rank: rank of LoRA adapters; 0 trains all weights.
        kl: weight of the KL divergence to the initial model.
        mini_batches: updates per batch of dialogues.
        micro_batch_tokens: tokens per forward pass; bounds memory.
        recompute: compute activations again in the backward pass; less memory, more time.
        evaluate_every: steps between evaluations on the held-out scenarios; 0 for none. The best
            checkpoint is kept in the run's folder best/.
        dtype: precision of generation and of the forward pass.
        checkpoint_every: steps between checkpoints.
        seed: of tasks and sampling.
        save_hf: folder to export the trained model to.
    """

    world: Literal["empathy", "tabular"] = "empathy"
    model: str = "smollm2"
    judge: Literal["embedding", "llm", "openai"] = "embedding"
    judge_model: str = ""
    judge_url: str = ""
    judge_timeout: float = 60.0
    scenarios: Path | None = None
    empa: Path | None = None
    baseline: str = ""
    alpha: float = 0.5
    gamma: float = 0.85
    batch_scope: Literal["group", "batch"] = "group"
    reward: RewardKind = "idr"
    steps: int = 16
    groups: int = 4
    group_size: int = 4
    max_turns: int = 4
    min_turns: int = 12
    max_new_tokens: int = 48
    temperature: float = 0.7
    learning_rate: float = 8e-5
    lora_rank: int = 0
    kl: float = 0.0
    mini_batches: int = 1
    micro_batch_tokens: int = 1024
    recompute: bool = False
    evaluate_every: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpoint_every: int = 10
    seed: int = 0
    save_hf: Path | None = None

    def validate(self) -> None:
        """Check what the types cannot say.

        Raises:
            InputError: names the flag.
        """
        get_estimator(self.baseline or "mapo")
        if self.scenarios is not None and self.empa is not None:
            raise InputError("scenarios and empa must not both be given")
        if self.empa is not None and self.judge == "embedding":
            raise InputError("empa needs --judge llm or openai: its cases are Chinese, unscripted")
        for name in ("alpha", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if not self.judge_timeout > 0:
            raise InputError(f"judge_timeout must be above 0, got {self.judge_timeout}")
        if self.save_hf is not None:
            check_new(self.save_hf)
        _ = self.epm, self.training, self.loss  # check themselves
        if self.world == "empathy":
            _ = self.speech
        check_numbers(self)

    @property
    def epm(self) -> EPMConfig:
        """Constants of the world's model of a person."""
        return EPMConfig(max_turns=self.max_turns, min_turns=self.min_turns)

    @property
    def training(self) -> TrainerConfig:
        """Options of the trainer."""
        return from_flags(
            TrainerConfig,
            self,
            estimator=self.estimator,
            estimator_options=self.estimator_options,
            autocast=self.dtype,
        )

    @property
    def speech(self) -> RolloutConfig:
        """How replies are generated."""
        from normkit.rl.rollout import RolloutConfig

        return from_flags(RolloutConfig, self)

    @property
    def loss(self) -> PolicyLossConfig:
        """Options of the loss."""
        return PolicyLossConfig(kl_weight=self.kl)

    @property
    def estimator(self) -> str:
        """Name of the estimator that is used."""
        return get_estimator(self.baseline or "mapo").name

    @property
    def estimator_options(self) -> dict[str, Any]:
        """MAPO's options, as far as the estimator has them."""
        given = {"alpha": self.alpha, "gamma": self.gamma, "batch_scope": self.batch_scope}
        if self.estimator not in _MAPO_FAMILY:
            return {}
        options = get_estimator(self.estimator).options
        return {name: value for name, value in given.items() if name in options}


def run(config: Config, folder: Path) -> Mapping[str, Any]:
    """Train a chat model on emotional-support dialogues, or compare estimators in a small world."""
    config.validate()
    if config.world == "tabular":
        from normkit.recipes._mapo_tabular import run_tabular

        return run_tabular(config, folder)
    from normkit.recipes._mapo_language import run_language

    return run_language(config, folder)


def make_environment(config: Config, folder: Path) -> EmpathyEnvironment:
    """Build the world of a configuration: scenarios, judge and simulated user.

    Raises:
        InputError: where a judge lacks its model or address, or there are too few scenarios.
    """
    train, heldout = _scenarios(config)
    world = EmpathyConfig(epm=config.epm, reward=config.reward)
    if config.judge == "embedding":
        from normkit.rl.judges.embedding import EmbeddingJudge

        return EmpathyEnvironment(train, heldout, EmbeddingJudge(), None, world)
    from normkit.rl.users.llm import LLMUser

    if not config.judge_model:
        raise InputError(f"judge_model: --judge {config.judge} needs --judge-model NAME")
    if config.judge == "llm":
        from normkit.rl.chat_local import LocalChat
        from normkit.rl.judges.llm import LLMJudge
        from normkit.rl.models import load_policy

        chat = LocalChat(*load_policy(config.judge_model, config.dtype))
        return EmpathyEnvironment(train, heldout, LLMJudge(chat), LLMUser(chat), world)
    from normkit.rl.judges.openai import OpenAIJudge

    if not config.judge_url:
        raise InputError("judge_url: --judge openai needs --judge-url http://HOST:PORT")
    judge = OpenAIJudge(
        config.judge_url,
        config.judge_model,
        cache_dir=folder.parent / "judge-cache",
        timeout=config.judge_timeout,
    )
    judge.check()
    return EmpathyEnvironment(train, heldout, judge, LLMUser(judge.chat), world)


def _scenarios(config: Config) -> tuple[list[Scenario], list[Scenario]]:
    if config.empa is not None:
        return load_empa(config.empa, "train"), load_empa(config.empa, "heldout")
    if config.scenarios is None:
        return builtin_scenarios("train"), builtin_scenarios("heldout")
    own = load_scenarios(config.scenarios)
    if len(own) < 3:
        raise InputError(f"scenarios: {config.scenarios} must hold at least 3 scenarios")
    cut = len(own) - len(own) // 3
    return own[:cut], own[cut:]


SYSTEM = System(
    slug="mapo",
    title="MAPO: Mixed Advantage Policy Optimization for Long-Horizon Multi-Turn Dialogue",
    arxiv="2603.06194",
    year=2026,
    tags=("advantages", "multi-turn RL", "dialogue"),
    symbols=("normkit.rl.advantage.mapo", "normkit.rl.trainer.Trainer"),
    Config=Config,
    run=run,
    claims=(*CLAIMS, *MEASURED, *MEASURED_LANGUAGE),
    aliases=("mica",),
)
