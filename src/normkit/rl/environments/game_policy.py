"""A language model as a policy over the legal moves of a game: exact, nothing is sampled.

``p(move | state) = p(reply "<answer>move</answer>") / sum over legal moves``, replies ended, at the
temperature that it plays at; its own earlier moves stand in its context as such replies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from normkit.rl.chat_format import ChatFormat
from normkit.rl.dialogue import PackedRow
from normkit.rl.environments.games import GameConfig, OpenSpielText
from normkit.rl.policy import collate, token_logprobs


class LanguagePolicy:
    """What a chat model would do, as :func:`normkit.rl.self_play.exploitability` takes it.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer, with a chat template.
        temperature: it plays at.
        config: options of the texts, without thinking.

    Attributes:
        legal: the probability of a legal reply in each state that was asked for, by its history:
            how far the policy is from what the model would really say.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        temperature: float = 1.0,
        config: GameConfig | None = None,
    ) -> None:
        self.model = model
        self.format = ChatFormat(tokenizer)
        self.temperature = temperature
        self.config = config or GameConfig()
        self.legal: dict[str, float] = {}

    @torch.no_grad()
    def __call__(self, state: Any, seat: int) -> Mapping[int, float]:
        """Probabilities of the legal moves of a state whose seat is to move."""
        context = self._context(state, seat)
        moves = self._text(state, len(state.history())).legal()
        device = next(self.model.parameters()).device
        rows = [self._row(context, move, number) for number, move in enumerate(moves)]
        batch = collate(rows, device)
        logprobs, _ = token_logprobs(self.model, batch, self.temperature)
        whole = torch.zeros(len(moves), dtype=torch.float64, device=device)
        whole.index_add_(0, batch.turn_row, logprobs.double())
        self.legal[state.history_str()] = float(whole.exp().sum())
        return dict(zip(moves.values(), torch.softmax(whole, 0).tolist(), strict=True))

    def _text(self, state: Any, length: int) -> OpenSpielText:
        """The game after the first ``length`` actions of a state's history."""
        game = str(state.get_game())
        return OpenSpielText(game, config=self.config, history=state.history()[:length])

    def _context(self, state: Any, seat: int) -> list[int]:
        """What the seat was told and replied, up to where its reply begins."""
        told: list[int] = []
        reply: list[int] = []
        past = state.full_history()
        own = [number for number, turn in enumerate(past) if turn.player == seat]
        for number in (*own, len(past)):
            text = self._text(state, number)
            if not told:
                told = self.format.opening(text.system(seat), text.render(seat))
            else:
                told += reply + self.format.following(text.render(seat), self.format.closed(reply))
            if number < len(past):
                reply = self._reply(text.words.move(text.state, seat, past[number].action))
        return told

    def _reply(self, move: str) -> list[int]:
        end = self.format.closing_id
        ids = self.format.tokenizer(f"<answer>{move}</answer>", add_special_tokens=False)
        return [*ids["input_ids"], self.format.end_ids[0] if end is None else end]

    def _row(self, context: list[int], move: str, number: int) -> PackedRow:
        reply = self._reply(move)
        ids = torch.tensor(context + reply)
        owner = torch.full((len(ids),), -1)
        owner[len(context) :] = number
        return PackedRow(ids, owner, torch.zeros(len(ids)))
