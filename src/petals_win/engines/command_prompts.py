"""What a program that knows texts alone is given for a request, and how many tokens that is.

Knows tokenizers. Does not know programs.
"""

from __future__ import annotations

from typing import Protocol

from petals_win.engines.base import ContextTooLong, GenerationRequest
from petals_win.engines.outside import guessed_tokens
from petals_win.errors import UserError


class Reader(Protocol):
    """Of one model, whose context has `context` tokens. exact: whether tokens are counted, and not guessed."""

    context: int
    exact: bool

    def read(self, request: GenerationRequest) -> tuple[str, int]:
        """The text, and its tokens. Raises UserError for what cannot be made a text, or is too long."""
        ...

    def count(self, text: str) -> int:
        """The tokens of an answer."""
        ...

    def limit(self, asked: int | None, prompt_tokens: int) -> int | None:
        """The most tokens that an answer may have; None if nobody knows."""
        ...


class GuessingReader:
    """Without a tokenizer: texts go as they are, and so does a single question. Tokens are guessed."""

    exact = False

    def __init__(self, name: str, context: int):
        self._name, self.context = name, context

    def read(self, request: GenerationRequest) -> tuple[str, int]:
        text = request.prompt if isinstance(request.prompt, str) else self._only_question(request)
        if not text:
            raise UserError("The prompt is empty. Send some text.")
        return text, guessed_tokens(text)

    def _only_question(self, request: GenerationRequest) -> str:
        messages = request.messages or ()
        if len(messages) != 1 or messages[0]["role"] != "user":
            raise UserError(
                f"{self._name} takes one question at a time: the file that describes it names no tokenizer, whose chat "
                "template would make one text of several messages."
            )
        return messages[0]["content"]

    def count(self, text: str) -> int:
        return guessed_tokens(text)

    def limit(self, asked: int | None, prompt_tokens: int) -> int | None:
        return None if asked is None else min(asked, self.context)


class TokenizerReader:
    """By the model's tokenizer and chat template, from a folder. Raises UserError if there is none that can be read."""

    exact = True

    def __init__(self, name: str, context: int, folder: str):
        from petals_win.engines.prompts import PromptEncoder
        from petals_win.models.tokenizer import load_tokenizer

        self.context = context
        self._tokenizer = load_tokenizer(name, folder, local_files_only=True)
        self._prompts = PromptEncoder(name, self._tokenizer, len(self._tokenizer))

    def read(self, request: GenerationRequest) -> tuple[str, int]:
        tokens = len(self._prompts.encode(request).tokens)
        if tokens >= self.context:
            raise ContextTooLong(tokens, self.context)
        return self._prompts.as_text(request), tokens

    def count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def limit(self, asked: int | None, prompt_tokens: int) -> int | None:
        room = self.context - prompt_tokens
        return min(asked or room, room)
