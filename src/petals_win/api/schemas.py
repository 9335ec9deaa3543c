"""The requests that OpenAI's clients send, and those of other servers. Knows their fields, what in them asks for nothing,
and which of them would change what an answer means in a way that no engine here can do: these are refused by name.

What is neither known nor refused is ignored, so that front-ends made for other servers work, and named in the log.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from petals_win.api.documented import null_is_left_out, text_or_list
from petals_win.api.errors import ApiError
from petals_win.api.messages import Message, Text, name_results, whole_characters
from petals_win.api.structure import Structured
from petals_win.api.tool_schemas import (
    CalledFunction,
    Choice,
    NamedFunction,
    Tool,
    ToolFunction,
    check_tool_types,
    checked_choice,
    read_choice,
)
from petals_win.engines.base import GenerationRequest

logger = logging.getLogger(__name__)

MAX_CHOICES = 16
# OpenAI's own default for /v1/completions; a chat answer may be as long as the context allows.
COMPLETION_MAX_TOKENS = 16

# Fields of OpenAI's, and common ones of Ollama's and llama.cpp's, that say nothing about the text of the answer.
IGNORED = {
    "cache_prompt",
    "keep_alive",
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}

# What other servers call a field.
SPELLINGS = {
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


def _asks(value: Any) -> bool:
    """Whether the value of a field that is not supported asks for something: false, 0, "", [] and {} do not."""
    return bool(value)


def _unless(*neutral: Any) -> Callable[[Any], bool]:
    return lambda value: bool(value) and value not in neutral


def penalty_in_bounds(value: float | None) -> float | None:
    """A repetition penalty, of which 0 means none. Raises ValueError for one that no logit can be multiplied by."""
    if value == 0:
        return 1.0  # of programs whose fields that nobody set are 0; nothing can be multiplied by it
    if value is not None and value < 0.01:
        raise ValueError("less than 0.01 would make logits infinite; 1 is no penalty")
    return value


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    include_usage: Annotated[bool, Field(description="a last event before [DONE] counts the tokens")] = False
    continuous_usage_stats: Annotated[bool, Field(description="every event counts the tokens so far")] = False


class Sampling(Structured):
    """What chat and plain completion have in common. A field that is null counts as left out."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, json_schema_extra=null_is_left_out)

    # Fields that would change what the answer means, each with what tells whether its value asks for that.
    refused: ClassVar[dict[str, Callable[[Any], bool]]] = {
        "allowed_token_ids": _asks,
        "bad_words": _asks,
        "prompt_logprobs": _asks,
        "use_beam_search": _asks,
    }

    model: Annotated[Text, Field(description="its name, in any case, with or without its owner")]
    stream: Annotated[bool, Field(description="as server-sent events, token by token")] = False
    stream_options: Annotated[
        StreamOptions,
        Field(description="count the tokens in a last event; with continuous_usage_stats in every event"),
    ] = StreamOptions()
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES, description="how many answers; each draws anew")] = 1
    max_tokens: Annotated[
        int | None,
        Field(
            ge=-2,
            description="0, -1, -2, and in chats left out: as long as the context allows; in completions left out: 16",
        ),
    ] = None
    min_tokens: Annotated[int, Field(ge=0, description="the answer does not end by itself before")] = 0
    ignore_eos: Annotated[bool, Field(description="the answer does not end by itself at all")] = False
    temperature: Annotated[
        float | None,
        Field(
            ge=0,
            le=2,
            description="0, and anything below 0.00001: the most likely token; left out: the model's own default",
        ),
    ] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, description="1: no limit; 0: the most likely token")] = None
    top_k: Annotated[int | None, Field(ge=-1, description="not in OpenAI's API; 0 and -1: no limit")] = None
    min_p: Annotated[float | None, Field(ge=0, le=1, description="not in OpenAI's API; 0: no limit")] = None
    repetition_penalty: Annotated[
        float | None,
        Field(ge=0, le=10, description="not in OpenAI's API; at least 0.01; 1 and 0: none"),
    ] = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, description="over the answer alone")] = 0
    presence_penalty: Annotated[float, Field(ge=-2, le=2, description="over the answer alone")] = 0
    logit_bias: Annotated[
        dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]],
        Field(description="token id to what is added to its logit"),
    ] = {}
    stop: Annotated[
        list[Text],
        Field(
            max_length=16,
            description="where the answer ends; a text or a list of texts, which are not part of it",
            json_schema_extra=text_or_list,
        ),
    ] = []
    stop_token_ids: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]],
        Field(max_length=64, description="tokens that end the answer, too, and are not part of its text"),
    ] = []
    seed: Annotated[
        int | None, Field(ge=-(2**63), lt=2**63, description="the same answer again; -1: another one each time")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, data: Any) -> Any:
        """Leave out what is null or ignored, bring other servers' spellings to ours, refuse what cannot be done."""
        if not isinstance(data, dict):
            return data
        given: dict[str, Any] = {}
        for sent, value in data.items():
            name = SPELLINGS.get(sent) or sent
            if value is None or (name != sent and data.get(name) is not None):
                continue
            if name in cls.model_fields:
                given[name] = value
            elif name in IGNORED:
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

    _penalty_in_bounds = field_validator("repetition_penalty")(penalty_in_bounds)

    def _requests(
        self, prompts: Sequence[dict[str, Any]], max_tokens: int | None, model: str
    ) -> list[GenerationRequest]:
        if len(prompts) * self.n > MAX_CHOICES:
            raise ApiError(400, f"More than {MAX_CHOICES} answers in one request. Ask several times.", param="n")
        seed = None if self.seed == -1 else self.seed
        constraint = self.constraint()
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
                stop_tokens=tuple(self.stop_token_ids),
                count_along=self.stream and self.stream_options.continuous_usage_stats,
                constraint=constraint,
                # With one seed for all, all the answers would be the same.
                seed=None if seed is None else seed + choice,
                **prompt,
            )
            for prompt in prompts
            for choice in range(self.n)
        ]


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    refused: ClassVar[dict[str, Callable[[Any], bool]]] = Sampling.refused | {
        "audio": _asks,
        "chat_template": _asks,
        "documents": _asks,
        "modalities": _unless(["text"]),
        "web_search_options": lambda value: True,
    }

    messages: Annotated[
        list[Message],
        Field(
            min_length=1,
            description="roles system, developer, user, assistant, tool and function; content as text or parts of type text; "
            "calls and results of tools, as the chat template shows them, or as text where it cannot",
        ),
    ]
    max_completion_tokens: Annotated[
        int | None, Field(ge=-2, description="the newer name of max_tokens; counts if both are given")
    ] = None
    tools: Annotated[
        list[Tool], Field(max_length=128, description="functions that the model may call; `strict` is of no effect")
    ] = []
    tool_choice: Annotated[
        Choice | NamedFunction,
        Field(description="none, auto, required (one call at least), or the function to call"),
    ] = "auto"
    parallel_tool_calls: Annotated[bool, Field(description="whether there may be several calls in an answer")] = True
    functions: Annotated[
        list[ToolFunction],
        Field(max_length=128, description="what tools were before; answers then have function_call"),
    ] = []
    function_call: Annotated[
        Literal["none", "auto"] | CalledFunction, Field(description="what tool_choice was before")
    ] = "auto"
    logprobs: Annotated[bool, Field(description="tell the log probability of each token")] = False
    top_logprobs: Annotated[
        int, Field(ge=0, le=20, description="with logprobs: how many of the likeliest tokens are told, too")
    ] = 0
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

    @field_validator("tools", mode="before")
    @classmethod
    def _only_functions(cls, value: Any) -> Any:
        check_tool_types(value)
        return value

    @field_validator("tool_choice", "function_call", mode="before")
    @classmethod
    def _a_choice(cls, value: Any, info: ValidationInfo) -> Any:
        return checked_choice(value, info.field_name == "function_call")

    @model_validator(mode="after")
    def _probabilities_of_what_is_told(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(
                400, "top_logprobs is for answers with logprobs. Set logprobs to true.", param="top_logprobs"
            )
        return self

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
        name_results(messages)
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
            "logprobs": self.top_logprobs if self.logprobs else None,
            **self._tools(),
        }
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._requests([conversation], most, model)

    @property
    def calls_functions(self) -> bool:
        """Whether calls are told in the older way, of which there is one in an answer."""
        return bool(self.functions) and not self.tools

    def _tools(self) -> dict[str, Any]:
        names = [tool.function.name for tool in self.tools], [function.name for function in self.functions]
        choice = read_choice(self.tool_choice, names[0], "tool_choice")
        older = read_choice(self.function_call, names[1], "function_call")
        functions = self.functions if self.calls_functions else [tool.function for tool in self.tools]
        return {
            "tools": tuple(function.as_tool() for function in functions),
            "tool_choice": older if self.calls_functions else choice,
            "parallel_tool_calls": self.parallel_tool_calls and not self.calls_functions,
        }


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    refused: ClassVar[dict[str, Callable[[Any], bool]]] = Sampling.refused | {"suffix": _asks}

    prompt: Annotated[
        str | list[str] | list[int] | list[list[int]],
        Field(description="text or token ids, or a list of several of either"),
    ]
    echo: Annotated[bool, Field(description="begin each answer with its prompt, which has to be text")] = False
    best_of: Annotated[int | None, Field(description="as many as n, or 1")] = None
    logprobs: Annotated[
        int | None,
        Field(ge=0, le=5, description="tell the log probability of each token, and of so many of the likeliest ones"),
    ] = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_kind_of_prompt(cls, value: Any) -> Any:
        if isinstance(value, str) or (isinstance(value, list) and value and _is_prompt_list(value)):
            for text in [value] if isinstance(value, str) else value:
                if isinstance(text, str):
                    whole_characters(text)
            return value
        raise ValueError("a text, a list of texts, a list of token ids or a list of such lists is needed")

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none_of_them(cls, value: Any) -> Any:
        return None if value is False else value

    @model_validator(mode="after")
    def _what_can_be_told(self) -> CompletionRequest:
        if self.best_of not in (None, 1, self.n):
            raise ApiError(
                400,
                "best_of: answers are not compared here, so all of them are sent. Leave it out, and set n.",
                code="unsupported",
                param="best_of",
            )
        if self.echo and self.logprobs is not None:
            raise ApiError(
                400,
                "echo: the log probabilities of a prompt are not known here. Leave out echo or logprobs.",
                code="unsupported",
                param="echo",
            )
        if self.echo and not all(isinstance(prompt, str) for prompt in self._prompts):
            raise ApiError(
                400, "echo: token ids are not repeated. Send the prompt as text.", code="unsupported", param="echo"
            )
        return self

    @property
    def echoed(self) -> list[str]:
        """What the text of each choice begins with, before the answer; empty if that is nothing."""
        return [prompt for prompt in self._prompts for _ in range(self.n)] if self.echo else []

    @property
    def _prompts(self) -> list[Any]:
        prompts: Any = self.prompt
        return [prompts] if isinstance(prompts, str) or isinstance(prompts[0], int) else prompts

    def requests(self, model: str) -> list[GenerationRequest]:
        """One request to `model` per prompt and choice, in the order of their indices."""
        return self._requests(
            [
                {"prompt": prompt if isinstance(prompt, str) else tuple(prompt), "logprobs": self.logprobs}
                for prompt in self._prompts
            ],
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
