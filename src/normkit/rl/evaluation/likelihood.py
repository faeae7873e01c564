"""How likely a local model finds each of several answers to a prompt.

Shapes: C answers, L tokens of the longest, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from normkit.errors import InputError
from normkit.rl.chat_format import ChatFormat
from normkit.rl.inference import cache_name


class AnswerLikelihood:
    r"""Log-likelihoods of answers, per byte of their text.

    ``sum_k log p(token_k | prompt, tokens before) / bytes(answer)``, so that a long answer is not
    unlikely for its length, and models with different tokenizers are comparable. The prompt is
    encoded once, all answers together behind it.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with a chat template.

    Raises:
        InputError: where the template cannot be used (:class:`ChatFormat`).
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.format = ChatFormat(tokenizer)

    @torch.inference_mode()
    def __call__(self, prompt: str, answers: Sequence[str]) -> list[float]:
        """Return the log-likelihood per byte of each answer to a prompt, in order.

        Args:
            prompt: the user's message.
            answers: texts that are not empty.

        Raises:
            InputError: where prompt and answer do not fit into the model's context.
        """
        opening = self.format.opening("", prompt)
        tokens = [self.tokenizer(a, add_special_tokens=False)["input_ids"] for a in answers]
        longest = max(map(len, tokens))
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None and len(opening) + longest > context:
            raise InputError(
                f"a question of {len(opening)} tokens and an answer of {longest} do not fit into "
                f"the context of {context} tokens"
            )
        device = next(self.model.parameters()).device
        ids = nn.utils.rnn.pad_sequence([torch.tensor(t) for t in tokens], batch_first=True)
        ids = ids.to(device)  # [C, L]; no token that counts sees the padding on its right
        shown = self.model(
            input_ids=torch.tensor([opening], device=device), use_cache=True, logits_to_keep=1
        )
        name = cache_name(self.model)
        cache = getattr(shown, name)
        cache.batch_repeat_interleave(len(answers))
        # The logits after the last token are of no use, but no model can be called without tokens.
        behind = ids[:, : max(longest - 1, 1)]
        after = self.model(input_ids=behind, use_cache=True, **{name: cache}).logits
        first = shown.logits.expand(len(answers), -1, -1)
        logits = torch.cat([first, after], dim=1)[:, :longest]  # [C, L, V]
        logprobs = torch.log_softmax(logits.float(), dim=-1).gather(-1, ids[..., None])[..., 0]
        return [
            float(logprobs[i, : len(tokens[i])].sum()) / len(answer.encode())
            for i, answer in enumerate(answers)
        ]
