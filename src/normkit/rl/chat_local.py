"""Local chat models: any causal language model of transformers that has a chat template.

Shapes: B conversations generated together, L tokens of the longest prompt.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from normkit.errors import InputError
from normkit.rl.chat import Message, plain_text, without_reasoning
from normkit.rl.judge import Failed


class LocalChat:
    """A chat model of transformers, on this machine.

    Prompts of similar length are padded on the left and generated together. The model's training
    mode, its generation settings and torch's global random state are as before after every call.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        batch_size: prompts generated together.
        temperature: sampling temperature; 0 takes the likeliest token.
        max_tokens: longest answer in tokens.
        seed: sampling seed; the same batch of conversations gets the same answers.

    Raises:
        InputError: where the tokenizer has no chat template, or an option is out of range.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int = 8,
        temperature: float = 0.0,
        max_tokens: int = 512,
        seed: int = 0,
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("tokenizer must have a chat template; use an instruction-tuned model")
        if batch_size < 1 or max_tokens < 1:
            raise InputError(
                f"batch_size and max_tokens must be at least 1, got {batch_size} and {max_tokens}"
            )
        if temperature < 0:
            raise InputError(f"temperature must not be negative, got {temperature}")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.temperature = temperature
        self.max_tokens = max_tokens
        self.seed = seed

    @property
    def name(self) -> str:
        """The last part of the model's name or path."""
        path = str(getattr(self.model.config, "name_or_path", ""))
        return Path(path).name or type(self.model).__name__

    def complete(self, conversations: Sequence[Sequence[Message]]) -> list[str | Failed]:
        """Return the next assistant message of each conversation, in order.

        A conversation that does not fit into the model's context has failed.
        """
        prompts = [self._encode(messages) for messages in conversations]
        answers: list[str | Failed] = [Failed("not asked")] * len(prompts)
        context = getattr(self.model.config, "max_position_embeddings", None) or math.inf
        fitting = []
        for i, prompt in enumerate(prompts):
            if len(prompt) + self.max_tokens <= context:
                fitting.append(i)
            else:
                answers[i] = Failed(
                    f"a prompt of {len(prompt)} tokens and an answer of {self.max_tokens} do not "
                    f"fit into the context of {context} tokens"
                )
        fitting.sort(key=lambda i: (len(prompts[i]), i), reverse=True)
        training = self.model.training
        self.model.eval()
        try:
            for start in range(0, len(fitting), self.batch_size):
                part = fitting[start : start + self.batch_size]
                for i, text in zip(part, self._generate([prompts[i] for i in part]), strict=True):
                    answers[i] = without_reasoning(text)
        finally:
            self.model.train(training)
        return answers

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        from jinja2 import TemplateError

        messages = [{**message, "content": plain_text(message["content"])} for message in messages]
        render = self.tokenizer.apply_chat_template
        try:
            text = render(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError:
            if len(messages) < 2 or messages[0]["role"] != "system":
                raise
            # Some templates know no system role: its words then open the first message.
            system, opening, *rest = messages
            opening = {**opening, "content": f"{system['content']}\n\n{opening['content']}"}
            text = render([opening, *rest], tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return cast("list[int]", ids)

    def _generate(self, prompts: Sequence[list[int]]) -> list[str]:
        from transformers import GenerationConfig

        device = next(self.model.parameters()).device
        stop = self.model.generation_config.eos_token_id
        stop = self.tokenizer.eos_token_id if stop is None else stop
        pad = self.tokenizer.pad_token_id
        pad = (stop[0] if isinstance(stop, list) else stop) if pad is None else pad
        length = max(map(len, prompts))
        ids = torch.full((len(prompts), length), pad, dtype=torch.int64)  # [B, L]
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
            mask[row, length - len(prompt) :] = 1
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_k": 0,
                "top_p": 1.0,
            }
        config = GenerationConfig(
            max_new_tokens=self.max_tokens, eos_token_id=stop, pad_token_id=pad, **sampling
        )
        # The draws depend on the batch and the seed alone, not on what ran before.
        content = repr((self.seed, list(prompts))).encode()
        seed = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 1
        forked = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices=forked):
            torch.manual_seed(seed)
            output = self.model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config
            )
        texts = self.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        return cast("list[str]", texts)
