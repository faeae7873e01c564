"""Multi-turn RL as one writes it first: the peer of benchmarks/rollout.py and benchmarks/update.py.

Every turn starts from text: the whole dialogue goes through the chat template, the tokenizer and
``transformers``' ``generate`` again (with its own KV cache, left-padded), and training runs one
pass per turn over that turn's whole row, with logits everywhere. Here too is the world that both
play, whose user says the same lines whatever it hears: the work is equal and the world is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from normkit.rl.environment import Reply, Split, Step
from normkit.rl.models import DtypeName, load_policy, resolve_dtype

SYSTEM = (
    "You are a warm, attentive listener. Answer in one or two sentences and ask before advising."
)
OPENINGS = (
    "I failed the exam I had been preparing for since spring, and I cannot tell my parents.",
    "My best friend moved away last week. The flat is so quiet now that I keep the radio on.",
    "They gave my project to somebody else, and I read about it in the newsletter.",
    "I have not slept properly since the accident, though nobody was hurt.",
)
MESSAGES = (
    "It is not the thing itself, it is that nobody asked me how I was.",
    "Maybe. I don't know. When I try to explain it everybody tells me to look ahead, and then I "
    "feel as if I were making it all up.",
    "Yes, that is close to it.",
    "I used to be the one who kept everybody together. Now I sit in the kitchen and count what I "
    "did wrong, and the list is always the same.",
    "What would you do?",
    "Thank you. That helps a little, more than I thought it would when I began to write.",
)


@dataclass
class Session:
    """A scripted dialogue."""

    task: str
    message: str
    seed: int
    system: str = SYSTEM
    turn: int = 0


class Script:
    """A world that says the same lines whatever it hears."""

    def __init__(self, turns: int) -> None:
        self.max_turns = turns

    def tasks(self, split: Split) -> list[str]:
        return list(OPENINGS)

    def start(self, task: str, seed: int) -> Session:
        return Session(task, task, seed)

    def line(self, seed: int, turn: int) -> str:
        return MESSAGES[(seed + turn) % len(MESSAGES)]

    def step(self, sessions: Sequence[Session], replies: Sequence[Reply]) -> list[Step]:
        steps = []
        for session in sessions:
            session.turn += 1
            over = session.turn == self.max_turns
            message = None if over else self.line(session.seed, session.turn)
            reward = float((session.seed + session.turn) % 5)
            steps.append(Step(reward, message, "max_turns" if over else None))
        return steps

    def score(self, session: Session) -> dict[str, float]:
        return {"score": 0.0}


@dataclass
class Pass:
    """What one turn leaves for training: rows ``[B, L]``, their mask, and the prompt's width."""

    rows: Tensor
    mask: Tensor
    width: int


class Prototype:
    """Generates every turn anew from text and trains one pass per turn.

    Args:
        dtype: of the generation; "bfloat16" (or what "auto" finds) trains under autocast.
        new_tokens: exact length of a reply (the end token is banned, for equal work).
        rows_per_pass: rows of one backward pass.
    """

    def __init__(self, dtype: DtypeName, new_tokens: int, rows_per_pass: int = 4) -> None:
        self.dtype, self.rows_per_pass = resolve_dtype(dtype), rows_per_pass
        self.model, self.tokenizer = load_policy("smollm2")
        self.tokenizer.padding_side = "left"
        self._cast: Any = None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        self.settings = GenerationConfig(
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )

    def generate(self, script: Script, count: int) -> list[Pass]:
        """Play ``count`` dialogues side by side."""
        openings = [OPENINGS[i * len(OPENINGS) // count] for i in range(count)]
        chats = [
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": opening}]
            for opening in openings
        ]
        speaker = self._speaker()
        passes = []
        for turn in range(script.max_turns):
            texts = [
                self.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
                for c in chats
            ]
            prompt = self.tokenizer(
                texts, return_tensors="pt", padding=True, add_special_tokens=False
            )
            ids, mask = prompt["input_ids"], prompt["attention_mask"]
            with torch.no_grad():
                rows = speaker.generate(
                    input_ids=ids, attention_mask=mask, generation_config=self.settings
                )
            replies = rows[:, ids.shape[1] :]
            whole = torch.nn.functional.pad(mask, (0, replies.shape[1]), value=1)
            passes.append(Pass(rows, whole, ids.shape[1]))
            for i, (chat, reply) in enumerate(zip(chats, replies, strict=True)):
                text = self.tokenizer.decode(reply, skip_special_tokens=True)
                chat.append({"role": "assistant", "content": text})
                chat.append({"role": "user", "content": script.line(i, turn + 1)})
        return passes

    def update(self, passes: Sequence[Pass]) -> None:
        """Train on every reply, a turn at a time."""
        mixed = self.dtype != torch.float32
        for one in passes:
            for first in range(0, len(one.rows), self.rows_per_pass):
                part = slice(first, first + self.rows_per_pass)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                    logits = self.model(one.rows[part], attention_mask=one.mask[part]).logits
                table = torch.log_softmax(logits[:, one.width - 1 : -1].float(), -1)
                chosen = table.gather(-1, one.rows[part, one.width :, None])
                share = len(chosen) / (len(one.rows) * len(passes))
                (-chosen.mean() * share).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _speaker(self) -> Any:
        if self.dtype == torch.float32:
            return self.model
        # A copy is cast before every batch, as weights change between batches.
        if self._cast is None:
            self._cast = load_policy("smollm2", "bfloat16")[0]
        with torch.no_grad():
            for own, trained in zip(self._cast.parameters(), self.model.parameters(), strict=True):
                own.copy_(trained)
        return self._cast


def sampled(passes: Sequence[Pass]) -> int:
    """Tokens that the replies have."""
    return sum(p.rows[:, p.width :].numel() for p in passes)
