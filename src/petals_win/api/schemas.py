"""The requests that OpenAI's clients send, and those of other servers. Knows their fields, what in them asks for nothing,
and which of them would change what an answer means in a way that no engine here can do: these are refused by name.

What is neither known nor refused is ignored, so that front-ends made for other servers work, and named in the log.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from petals_win.api.errors import ApiError
from petals_win.engines.base import GenerationRequest

logger = logging.getLogger(__name__)

MAX_CHOICES = 16
# OpenAI's own default for /v1/completions; a chat answer may be as long as the context allows.
COMPLETION_MAX_TOKENS = 16

# Fields of OpenAI's, and common ones of Ollama's and llama.cpp's, that say nothing about the text of the answer.
_IGNORED = {
    "cache_prompt",
    "keep_alive",
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

# What other servers call a field.
_SPELLINGS = {
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
}

_NAMED_AT_MOST = 100
_named: set[str] = set()


def name_once(field: str) -> None:
    """Log that a field is ignored: once for each name, and for so many that nobody fills the log with made-up names."""
    if field not in _named and len(_named) < _NAMED_AT_MOST:
        _named.add(field)
        logger.info("Requests have the field %s, which means nothing here and is ignored", ascii(field[:40]))


def _whole_characters(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) is no text")
    return text


# JSON can escape what UTF-8 cannot carry; no tokenizer takes it.
Text = Annotated[str, AfterValidator(_whole_characters)]


def _asks(value: Any) -> bool:
    """Whether the value of a field that is not supported asks for something: false, 0, "", [] and {} do not."""
    return bool(value)


def _unless(*neutral: Any) -> Callable[[Any], bool]:
    return lambda value: bool(value) and value not in neutral


class StreamOptions(BaseModel):
    """include_usage: a last event before [DONE] counts the tokens."""

    include_usage: bool = False


class Sampling(BaseModel):
    """What chat and plain completion have in common. A field that is null counts as left out."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    # Fields that would change what the answer means, each with what tells whether its value asks for that.
    refused: ClassVar[dict[str, Callable[[Any], bool]]] = {
        "allowed_token_ids": _asks,
        "bad_words": _asks,
        "format": _asks,
        "grammar": _asks,
        "guided_choice": _asks,
        "guided_grammar": _asks,
        "guided_json": _asks,
        "guided_regex": _asks,
        "json_schema": _asks,
        "logprobs": _asks,
        "prompt_logprobs": _asks,
        "response_format": _unless({"type": "text"}),
        "stop_token_ids": _asks,
        "structured_outputs": _asks,
        "use_beam_search": _asks,
    }

    model: Annotated[Text, Field(description="its name, in any case, with or without its owner")]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: Annotated[
        int | None,
        Field(ge=-2, description="0, -1 and -2: as long as the context allows; also called n_predict or num_predict"),
    ] = None
    min_tokens: Annotated[int, Field(ge=0)] = 0
    ignore_eos: bool = False
    temperature: Annotated[
        float | None, Field(ge=0, le=2, description="0: the most likely token; left out: the model's own default")
    ] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, description="1: no limit; 0: the most likely token")] = None
    top_k: Annotated[int | None, Field(ge=-1, description="not in OpenAI's API; 0 and -1: no limit")] = None
    min_p: Annotated[float | None, Field(ge=0, le=1, description="not in OpenAI's API; 0: no limit")] = None
    repetition_penalty: Annotated[
        float | None,
        Field(
            ge=0, le=10, description="not in OpenAI's API; at least 0.01; 1 and 0: none; also called repeat_penalty"
        ),
    ] = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]],
        Field(description="token id to what is added to its logit"),
    ] = {}
    stop: Annotated[list[Text], Field(max_length=16, description="a string or a list of strings")] = []
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63, description="-1: another one each time")] = None

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, data: Any) -> Any:
        """Leave out what is null or ignored, bring other servers' spellings to ours, refuse what cannot be done."""
        if not isinstance(data, dict):
            return data
        given: dict[str, Any] = {}
        for sent, value in data.items():
            name = _SPELLINGS.get(sent) or sent
            if value is None or (name != sent and data.get(name) is not None):
                continue
            if name in cls.model_fields:
                given[name] = value
            elif name in _IGNORED:
                continue
            elif name not in cls.refused:
                name_once(name)
            elif cls.refused[name](value):
                raise ApiError(400, f"{name} is not supported here. Leave it out.", code="unsupported", param=name)
        return given

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _no_bias(cls, value: Any) -> Any:
        return {} if value == [] else value

    @field_validator("repetition_penalty")
    @classmethod
    def _penalty_in_bounds(cls, value: float | None) -> float | None:
        if value == 0:
            return 1.0  # of programs whose fields that nobody set are 0; nothing can be multiplied by it
        if value is not None and value < 0.01:
            raise ValueError("less than 0.01 would make logits infinite; 1 is no penalty")
        return value

    def _requests(
        self, prompts: Sequence[dict[str, Any]], max_tokens: int | None, model: str
    ) -> list[GenerationRequest]:
        if len(prompts) * self.n > MAX_CHOICES:
            raise ApiError(400, f"More than {MAX_CHOICES} answers in one request. Ask several times.", param="n")
        seed = None if self.seed == -1 else self.seed
        return [
            GenerationRequest(
                model=model,
                max_tokens=max_tokens if max_tokens is not None and max_tokens > 0 else None,
                min_tokens=self.min_tokens,
                ignore_eos=self.ignore_eos,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=0 if self.top_k == -1 else self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                frequency_penalty=self.frequency_penalty,
                presence_penalty=self.presence_penalty,
                logit_bias=self.logit_bias,
                stop=tuple(stop for stop in self.stop if stop),
                # With one seed for all, all the answers would be the same.
                seed=None if seed is None else seed + choice,
                **prompt,
            )
            for prompt in prompts
            for choice in range(self.n)
        ]


class Function(BaseModel):
    """A function that the assistant called, with its arguments as JSON."""

    name: Text
    arguments: Any = "{}"

    @field_validator("arguments")
    @classmethod
    def _as_object(cls, value: Any) -> Any:
        """Chat templates expect an object. What is none stays the text that it is."""
        if isinstance(value, str):
            try:
                parsed = json.loads(value or "{}")
            except (ValueError, RecursionError):
                return value
            return parsed if isinstance(parsed, dict) else value
        return {} if value is None else value


class ToolCall(BaseModel):
    """A call of a tool, as answers of OpenAI's have it."""

    id: Text = ""
    function: Function


class Message(BaseModel):
    """One turn of a conversation. Other fields, as answers of OpenAI's have them, are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        Text,
        Field(
            description="text, or a list of parts of type text; may be null or left out of what assistants and tools say"
        ),
    ]
    name: Text | None = None
    tool_call_id: Text | None = None
    tool_calls: list[ToolCall] = []
    reasoning_content: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _bring_up_to_date(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if value is not None}
        if data.get("role") in ("assistant", "tool", "function"):
            data.setdefault("content", "")
        # What tool calls were before there were several of them.
        if "function_call" in data and not data.get("tool_calls"):
            data["tool_calls"] = [{"function": data["function_call"]}]
        return data

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        texts = [part if isinstance(part, str) else _text_of(part) for part in value]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("only parts of type text are supported here")
        return "".join(texts)

    def turn(self) -> dict[str, Any]:
        """As chat templates know it: "developer" is OpenAI's newer name for system, "function" the older one for tool."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        turn: dict[str, Any] = {"role": role, "content": self.content}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if value := getattr(self, name):
                turn[name] = value
        if self.tool_calls and role == "assistant":
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in self.tool_calls
            ]
        return turn


def _text_of(part: Any) -> Any:
    return part.get("text", part.get("refusal")) if isinstance(part, dict) else None


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    refused: ClassVar[dict[str, Callable[[Any], bool]]] = Sampling.refused | {
        "audio": _asks,
        "chat_template": _asks,
        "documents": _asks,
        "function_call": _unless("none", "auto"),
        "functions": _asks,
        "modalities": _unless(["text"]),
        "tool_choice": _unless("none", "auto"),
        "tools": _asks,
        "top_logprobs": _asks,
        "web_search_options": lambda value: True,
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[
        int | None, Field(ge=-2, description="the newer name of max_tokens; counts if both are given")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any], Field(description='variables of the model\'s chat template, e.g. {"enable_thinking": false}')
    ] = {}
    reasoning_effort: Annotated[Text | None, Field(description="for chat templates that know it")] = None
    enable_thinking: Annotated[bool | None, Field(description="for chat templates that know it")] = None
    continue_final_message: Annotated[
        bool | None,
        Field(description="go on with the text of the last message; left out: if it is the assistant's"),
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Field(description="begin a turn of the assistant; left out: unless one is continued")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _tools_that_may_not_be_called(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        idle = {
            name
            for name, choice in (("tools", "tool_choice"), ("functions", "function_call"))
            if data.get(choice) == "none"
        }
        return {name: value for name, value in data.items() if name not in idle}

    @model_validator(mode="after")
    def _one_way_to_go_on(self) -> ChatRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise ApiError(
                400,
                "continue_final_message and add_generation_prompt exclude each other. Leave one of them out.",
                param="continue_final_message",
            )
        return self

    def requests(self, model: str) -> list[GenerationRequest]:
        """One request to `model` per choice, in the order of their indices."""
        messages = [message.turn() for message in self.messages]
        _name_results(messages)
        last = messages[-1]
        continued = self.continue_final_message
        if continued is None:
            continued = last["role"] == "assistant" and "tool_calls" not in last and not self.add_generation_prompt
        variables = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.enable_thinking}
        conversation = {
            "messages": tuple(messages),
            "template": {n: v for n, v in variables.items() if v is not None} | self.chat_template_kwargs,
            "continue_final": continued,
            "generation_prompt": self.add_generation_prompt is not False,
        }
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._requests([conversation], most, model)


def _name_results(messages: list[dict[str, Any]]) -> None:
    """Results of tools name the call that they answer; chat templates want the tool's name, too."""
    tools = {call["id"]: call["function"]["name"] for turn in messages for call in turn.get("tool_calls", ())}
    for turn in messages:
        if turn["role"] == "tool" and (name := tools.get(turn.get("tool_call_id", ""))):
            turn.setdefault("name", name)


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    refused: ClassVar[dict[str, Callable[[Any], bool]]] = Sampling.refused | {
        "best_of": _unless(1),
        "echo": _asks,
        "suffix": _asks,
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

    def requests(self, model: str) -> list[GenerationRequest]:
        """One request to `model` per prompt and choice, in the order of their indices."""
        prompts: Any = self.prompt
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        return self._requests(
            [{"prompt": prompt if isinstance(prompt, str) else tuple(prompt)} for prompt in prompts],
            COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            model,
        )


def _is_prompt_list(value: list[Any]) -> bool:
    return (
        all(isinstance(item, str) for item in value)
        or _are_token_ids(value)
        or all(isinstance(item, list) and item and _are_token_ids(item) for item in value)
    )


def _are_token_ids(value: list[Any]) -> bool:
    return all(type(item) is int and 0 <= item < 2**31 for item in value)
