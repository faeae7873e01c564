"""A model behind an OpenAI-compatible server as the judge."""

from __future__ import annotations

from typing import Any

from normkit.rl.chat_client import OpenAIChat
from normkit.rl.judges.llm import ChatJudge
from normkit.rl.judges.prompt import worth_keeping


class OpenAIJudge(ChatJudge):
    """A judge whose model is asked over HTTP.

    With a cache, only verdicts that can be used are kept: what a model got wrong it is asked again
    the next time.

    Args:
        url: address of the server, with or without ``/v1``.
        model: the name that the server knows the model by.
        repairs: how often the model may correct a verdict.
        window: how many of the earlier exchanges the model is shown; None for all.
        options: the other fields of :class:`~normkit.rl.chat_client.OpenAIChat`, such as
            ``concurrency``, ``timeout``, ``retries`` and ``cache_dir``.
    """

    kind = "openai"
    chat: OpenAIChat

    def __init__(
        self, url: str, model: str, repairs: int = 1, window: int | None = 12, **options: Any
    ) -> None:
        super().__init__(OpenAIChat(url, model, keep=worth_keeping, **options), repairs, window)

    def check(self) -> None:
        """Ask the server for one word, so that a wrong address, key or model is found at once.

        Raises:
            NormkitError: with what is wrong.
        """
        self.chat.check()
