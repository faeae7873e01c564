"""Models under evaluation: on this machine, or behind an OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from normkit.errors import InputError
from normkit.rl.chat import ChatModel
from normkit.rl.checkpoint import has_checkpoint, load_checkpoint
from normkit.rl.dialogue import Dialogue
from normkit.rl.environment import Environment
from normkit.rl.evaluation.dialogues import play_chat
from normkit.rl.evaluation.emobench import LikelihoodScorer
from normkit.rl.evaluation.measure import Report
from normkit.rl.models import DtypeName, load_policy, resolve_dtype, with_lora
from normkit.rl.rollout import Rollout, RolloutConfig
from normkit.runs import read_json


class Player(Protocol):
    """A model that can be asked, weighed and played with."""

    @property
    def name(self) -> str:
        """What the model is called in tables."""

    def chat(self, max_tokens: int) -> ChatModel:
        """The model as a chat model that answers greedily."""

    def likelihood(self) -> LikelihoodScorer:
        """What tells how likely the model finds given answers.

        Raises:
            InputError: where that cannot be known.
        """

    def play(
        self,
        environment: Environment[Any],
        tasks: Sequence[tuple[str, int, int]],
        speech: RolloutConfig,
        seed: int,
        report: Report,
    ) -> list[Dialogue]:
        """Play one dialogue per task; different seeds give different samples."""


class LocalPlayer:
    """A model of transformers.

    Args:
        name: ``"smollm2"``, a name on the Hugging Face hub, a folder that transformers can load, or
            a run that trained one (its folder, or the checkpoint in it).
        dtype: dtype of the weights.
        batch_size: conversations that are answered together.

    Raises:
        InputError: where the model cannot be loaded or has no chat template.
    """

    def __init__(self, name: str, dtype: DtypeName = "auto", batch_size: int = 16) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name = name
        self._dtype: DtypeName = (
            "bfloat16" if resolve_dtype(dtype, device) == torch.bfloat16 else "float32"
        )
        self._batch_size = batch_size
        model, self._tokenizer = _load(name, self._dtype)
        self._model = model.to(device)
        self._rollout: Rollout | None = None

    def chat(self, max_tokens: int) -> ChatModel:
        """The model as a chat model that answers greedily."""
        from normkit.rl.chat_local import LocalChat

        return LocalChat(self._model, self._tokenizer, self._batch_size, max_tokens=max_tokens)

    def likelihood(self) -> LikelihoodScorer:
        """What tells how likely the model finds given answers."""
        from normkit.rl.evaluation.likelihood import AnswerLikelihood

        return AnswerLikelihood(self._model, self._tokenizer)

    def play(
        self,
        environment: Environment[Any],
        tasks: Sequence[tuple[str, int, int]],
        speech: RolloutConfig,
        seed: int,
        report: Report,
    ) -> list[Dialogue]:
        """Play one dialogue per task; the samples depend on the seeds of the tasks alone."""
        speech = replace(speech, dtype=self._dtype)
        if self._rollout is None:
            self._rollout = Rollout(self._model, self._tokenizer, speech)
        return self._rollout.with_config(speech).run(environment, tasks, report)


class ServedPlayer:
    """A model behind an OpenAI-compatible server.

    Args:
        name: the name that the server knows the model by.
        url: address of the server.
        cache_dir: folder that keeps answers, so that an interrupted evaluation goes on for free.

    Raises:
        NormkitError: where the server does not answer, refuses the key, or lacks the model.
    """

    def __init__(self, name: str, url: str, cache_dir: str | Path | None) -> None:
        self.name = name
        self._url = url
        self._cache_dir = cache_dir
        self._client(max_tokens=16).check()

    def _client(self, max_tokens: int, **options: Any) -> Any:
        from normkit.rl.chat_client import OpenAIChat

        options = {"cache_dir": self._cache_dir, "max_tokens": max_tokens, **options}
        return OpenAIChat(self._url, self.name, **options)

    def chat(self, max_tokens: int) -> ChatModel:
        """The model as a chat model that answers greedily."""
        chat: ChatModel = self._client(max_tokens)
        return chat

    def likelihood(self) -> LikelihoodScorer:
        """Not to be had of a server.

        Raises:
            InputError: always.
        """
        raise InputError(
            "likelihood needs the model on this machine; servers give no likelihood of an answer"
        )

    def play(
        self,
        environment: Environment[Any],
        tasks: Sequence[tuple[str, int, int]],
        speech: RolloutConfig,
        seed: int,
        report: Report,
    ) -> list[Dialogue]:
        """Play one dialogue per task; the server is told the temperature and the seed."""
        temperature = 0.0 if speech.greedy else speech.temperature
        client = self._client(
            speech.max_new_tokens,
            temperature=temperature,
            seed=None if speech.greedy else seed,
            extra={} if speech.greedy or speech.top_p == 1.0 else {"top_p": speech.top_p},
        )
        return play_chat(environment, tasks, client, report)


def _load(name: str, dtype: DtypeName) -> tuple[Any, Any]:
    """Load a model by name or folder; a folder of a run gives the model that it trained."""
    folder = Path(name)
    checkpoint = next(filter(has_checkpoint, (folder / "checkpoint", folder)), None)
    if checkpoint is None:
        return load_policy(name, dtype)
    config = read_json(checkpoint.parent, "config.json")
    if not isinstance(config.get("model"), str):
        raise InputError(f"model: {checkpoint.parent / 'config.json'} does not name its base model")
    model, tokenizer = load_policy(config["model"], dtype)
    if rank := config.get("lora_rank"):
        model = with_lora(model, int(rank))
    load_checkpoint(checkpoint, model)
    return model.eval(), tokenizer
