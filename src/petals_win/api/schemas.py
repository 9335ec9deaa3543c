"""The requests that OpenAI's clients send. Knows their fields, and which of them would change the answer in a way
that no engine here can do: these are refused by name, so that nobody gets an answer other than the one asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from petals_win.api.errors import ApiError
from petals_win.engines.base import GenerationRequest

MAX_CHOICES = 16
# OpenAI's own default for /v1/completions; a chat answer may be as long as the context allows.
COMPLETION_MAX_TOKENS = 16

# Fields of OpenAI's that say nothing about the text of the answer.
_IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}


def _whole_characters(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no text")
    return text


# JSON can escape what UTF-8 cannot carry; no tokenizer takes it.
Text = Annotated[str, AfterValidator(_whole_characters)]


class StreamOptions(BaseModel):
    """include_usage: a last event before [DONE] counts the tokens."""

    include_usage: bool = False


class Sampling(BaseModel):
    """What chat and plain completion have in common. A field that is null counts as left out."""

    model_config = ConfigDict(extra="forbid")

    # Fields that are not supported, with the values that ask for nothing and are let through.
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "logit_bias": ({},),
        "presence_penalty": (0,),
    }

    model: Text
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, description="left out: the model's own default")] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, description="not in OpenAI's API; 0: no limit")] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=10, description="not in OpenAI's API")] = None
    stop: Annotated[list[Text], Field(max_length=16, description="a string or a list of strings")] = []
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None and name not in _IGNORED}
        for name in list(given):
            if name in cls.model_fields:
                continue
            if name not in cls.unsupported:
                raise ApiError(400, f"There is no field {name[:40]!r}. /docs lists the fields.", code="unknown_field")
            if given.pop(name) not in cls.unsupported[name]:
                raise ApiError(400, f"{name} is not supported here. Leave it out.", code="unsupported", param=name)
        return given

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def _requests(self, prompts: Sequence[dict[str, Any]], max_tokens: int | None) -> list[GenerationRequest]:
        if len(prompts) * self.n > MAX_CHOICES:
            raise ApiError(400, f"More than {MAX_CHOICES} answers in one request. Ask several times.", param="n")
        return [
            GenerationRequest(
                model=self.model,
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                repetition_penalty=self.repetition_penalty,
                stop=tuple(stop for stop in self.stop if stop),
                # With one seed for all, all the answers would be the same.
                seed=None if self.seed is None else self.seed + choice,
                **prompt,
            )
            for prompt in prompts
            for choice in range(self.n)
        ]


class Message(BaseModel):
    """One turn of a conversation. Other fields, as answers of OpenAI's have them, are ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, Field(description="text, or a list of parts of type text")]

    @model_validator(mode="before")
    @classmethod
    def _refuse_tools(cls, data: Any) -> Any:
        if isinstance(data, dict) and (data.get("tool_calls") or data.get("function_call")):
            raise ValueError("tool calls are not supported here")
        return data

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
            raise ValueError("only parts of type text are supported here")
        return "".join(part["text"] for part in value)


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = Sampling.unsupported | {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "logprobs": (False,),
        "modalities": (["text"],),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[
        int | None, Field(ge=1, description="the newer name of max_tokens; counts if both are given")
    ] = None

    def requests(self) -> list[GenerationRequest]:
        """One request per choice, in the order of their indices."""
        # "developer" is OpenAI's newer name; chat templates know only "system".
        messages = tuple(
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in self.messages
        )
        return self._requests([{"messages": messages}], self.max_completion_tokens or self.max_tokens)


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = Sampling.unsupported | {
        "best_of": (1,),
        "echo": (False,),
        "logprobs": (),
        "suffix": ("",),
    }

    prompt: Annotated[
        str | list[str] | list[int] | list[list[int]],
        Field(description="text or token ids, or a list of several of either"),
    ]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_kind_of_prompt(cls, value: Any) -> Any:
        if isinstance(value, str) or (isinstance(value, list) and value and _is_prompt_list(value)):
            for text in [value] if isinstance(value, str) else value:
                if isinstance(text, str):
                    _whole_characters(text)
            return value
        raise ValueError("a text, a list of texts, a list of token ids or a list of such lists is needed")

    def requests(self) -> list[GenerationRequest]:
        """One request per prompt and choice, in the order of their indices."""
        prompts: Any = self.prompt
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        return self._requests(
            [{"prompt": prompt if isinstance(prompt, str) else tuple(prompt)} for prompt in prompts],
            self.max_tokens or COMPLETION_MAX_TOKENS,
        )


def _is_prompt_list(value: list[Any]) -> bool:
    return (
        all(isinstance(item, str) for item in value)
        or _are_token_ids(value)
        or all(isinstance(item, list) and item and _are_token_ids(item) for item in value)
    )


def _are_token_ids(value: list[Any]) -> bool:
    return all(type(item) is int and 0 <= item < 2**31 for item in value)
