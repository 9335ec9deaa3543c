"""The requests that Ollama's clients send. Knows their fields and what they ask of an engine; not how it is answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from petals_win.api.bodies import Body
from petals_win.api.documented import null_is_left_out, text_or_list
from petals_win.api.errors import ApiError
from petals_win.api.schemas import Message, Text, penalty_in_bounds
from petals_win.engines.base import Constraint, GenerationRequest
from petals_win.engines.keep_alive import seconds_of
from petals_win.errors import UserError

_TEXT_ONLY = "The models here read text alone. Leave it out."
_OFF = "0 and below: no limit"


class OllamaOptions(Body):
    """The field "options": how tokens are chosen. What is about memory and processors is ignored."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        ("num_ctx", "num_batch", "num_gpu", "num_thread", "num_keep", "main_gpu", "numa", "low_vram")
        + ("f16_kv", "use_mmap", "use_mlock")
    )

    num_predict: Annotated[int | None, Field(description="0, -1 and -2: as long as the context allows")] = None
    temperature: Annotated[float | None, Field(ge=0, le=100, description="left out: the model's own default")] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, description="1: no limit; 0: the most likely token")] = None
    top_k: Annotated[int | None, Field(description=_OFF)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1, description="0: no limit")] = None
    repeat_penalty: Annotated[float | None, Field(ge=0, le=10, description="at least 0.01; 1 and 0: none")] = None
    repeat_last_n: Annotated[
        int, Field(description="0: none of the three penalties; else they are over the whole text")
    ] = -1
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63, description="-1: another one each time")] = None
    stop: Annotated[
        list[Text],
        Field(max_length=16, description="a string or a list of strings", json_schema_extra=text_or_list),
    ] = []

    _penalty_in_bounds = field_validator("repeat_penalty")(penalty_in_bounds)

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_as_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def sampling(self) -> dict[str, Any]:
        """The fields of a GenerationRequest."""
        limit, penalized = self.num_predict, self.repeat_last_n != 0
        return {
            "max_tokens": limit if limit is not None and limit > 0 else None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "min_p": self.min_p,
            "repetition_penalty": self.repeat_penalty if penalized else 1.0,
            "frequency_penalty": self.frequency_penalty if penalized else 0.0,
            "presence_penalty": self.presence_penalty if penalized else 0.0,
            "seed": None if self.seed == -1 else self.seed,
            "stop": tuple(stop for stop in self.stop if stop),
        }


class _Asked(Body):
    """What a chat and a plain generation have in common."""

    model: Annotated[Text, Field(description='its name, in any case, with or without its owner and ":latest"')]
    stream: Annotated[bool, Field(description="lines of JSON as the answer comes, or one object")] = True
    options: OllamaOptions = OllamaOptions()
    format: Annotated[
        str | dict[str, Any] | None, Field(description='"json", or the JSON schema of which the answer shall be')
    ] = None
    think: Annotated[
        bool | Text | None,
        Field(description='for models that think: true, false, or how much ("low", "medium", "high")'),
    ] = None
    keep_alive: Annotated[
        str | float | None,
        Field(
            description='how long the model may then be idle ("5m", seconds, -1: for ever), if it is unloaded at all'
        ),
    ] = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @field_validator("keep_alive", mode="before")
    @classmethod
    def _known_duration(cls, value: Any) -> Any:
        try:
            if not isinstance(value, bool):
                seconds_of(value)
                return value
        except (UserError, TypeError, ValueError, OverflowError):
            pass
        raise ValueError('a text such as "5m", or a number of seconds, is needed')

    @property
    def keep_s(self) -> float | None:
        """For how long the model may be idle (s, inf: for ever), if that is said."""
        return None if self.keep_alive is None else seconds_of(self.keep_alive)

    @field_validator("format", mode="before")
    @classmethod
    def _known_format(cls, value: Any) -> Any:
        if isinstance(value, dict) or value in ("json", ""):
            return value
        raise ValueError('"json" or a JSON schema is needed')

    @field_validator("think", mode="before")
    @classmethod
    def _known_thinking(cls, value: Any) -> Any:
        if isinstance(value, bool | str):
            return value
        raise ValueError('true, false or a level such as "low" is needed')

    def _request(self, model: str, **prompt: Any) -> GenerationRequest:
        constraint = None
        if self.format is not None and self.format != "":
            schema = {"type": "object"} if self.format == "json" else self.format
            constraint = Constraint("json_schema", json.dumps(schema))
        logprobs = self.top_logprobs if self.logprobs else None
        return GenerationRequest(
            model=model, constraint=constraint, logprobs=logprobs, **self.options.sampling(), **prompt
        )

    def _template(self) -> dict[str, Any]:
        """The variables of the chat template that say whether to think."""
        if self.think is False:
            return {"enable_thinking": False}
        if not self.think:
            return {}
        return {"enable_thinking": True} | ({} if self.think is True else {"reasoning_effort": self.think})


class OllamaMessage(Message):
    """One turn of a conversation: role system, user, assistant or tool."""

    @model_validator(mode="before")
    @classmethod
    def _in_our_words(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("images"):
            raise ApiError(400, f"images is not supported here. {_TEXT_ONLY}", code="unsupported", param="images")
        turn = {{"tool_name": "name", "thinking": "reasoning_content"}.get(name, name): data[name] for name in data}
        if turn.get("content") is None:
            turn["content"] = ""
        return turn


class OllamaFunction(BaseModel):
    model_config = ConfigDict(json_schema_extra=null_is_left_out)

    name: Annotated[Text, Field(min_length=1)]
    description: Text = ""
    parameters: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, data: Any) -> Any:
        return {name: data[name] for name in data if data[name] is not None} if isinstance(data, dict) else data


class OllamaTool(BaseModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    function: OllamaFunction


class OllamaChat(_Asked):
    """Body of POST /api/chat. Without messages, nothing is answered but that the model is there."""

    ignored: ClassVar[frozenset[str]] = frozenset(("truncate", "shift"))

    messages: list[OllamaMessage] = []
    tools: list[OllamaTool] = []

    def request(self, model: str) -> GenerationRequest:
        turns = [message.turn() for message in self.messages]
        _name_calls(turns)
        last = turns[-1]
        return self._request(
            model,
            messages=tuple(turns),
            template=self._template(),
            continue_final=last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last,
            tools=tuple({"type": "function", "function": tool.function.model_dump()} for tool in self.tools),
        )


class OllamaGenerate(_Asked):
    """Body of POST /api/generate. Without a prompt, nothing is answered but that the model is there."""

    ignored: ClassVar[frozenset[str]] = frozenset(("truncate", "shift"))
    refused: ClassVar[dict[str, str]] = {
        "context": "Send the conversation to /api/chat.",
        "images": _TEXT_ONLY,
        "suffix": "Nothing here fills a gap in a text. Leave it out.",
        "template": "The model has its own. Leave it out, or send the finished prompt with raw.",
    }

    prompt: Text = ""
    system: Text = ""
    raw: Annotated[bool, Field(description="the prompt is continued as it stands, without the chat template")] = False

    def request(self, model: str) -> GenerationRequest:
        if self.raw:
            if self.system:
                raise ApiError(400, "A raw prompt is all that there is: leave system out.", param="system")
            return self._request(model, prompt=self.prompt)
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = (*system, {"role": "user", "content": self.prompt})
        return self._request(model, messages=turns, template=self._template())


class OllamaShow(Body):
    """Body of POST /api/show."""

    ignored: ClassVar[frozenset[str]] = frozenset(("verbose", "system", "template", "options"))

    model: Annotated[Text, Field(description="its name; also called name")]

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "name" not in data:
            return data
        return {"model": data["name"]} | {name: value for name, value in data.items() if name != "name"}


def _name_calls(turns: Sequence[dict[str, Any]]) -> None:
    """Calls in Ollama's conversations have no ids, and results name the tool at most; chat templates want both.

    A result belongs to the first call before it that has none yet, of the tool that it names if it names one.
    """
    unanswered: list[dict[str, Any]] = []
    calls = 0
    for turn in turns:
        for call in turn.get("tool_calls", ()):
            # Nine letters and digits: the templates of Mistral's models take no other.
            call["id"] = call["id"] or f"call{calls:05}"
            calls += 1
            unanswered.append(call)
        if turn["role"] != "tool":
            continue
        given, name = turn.get("tool_call_id"), turn.get("name")
        fits = (
            call
            for call in unanswered
            if (not given or call["id"] == given) and (not name or call["function"]["name"] == name)
        )
        if (call := next(fits, None)) is not None:
            unanswered.remove(call)
            turn |= {"tool_call_id": call["id"], "name": call["function"]["name"]}
