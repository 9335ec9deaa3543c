"""The job model: requests and events of the engine protocol as messages and back, whatever carries the messages.

Knows both sides' types, and what of a message makes sense. Does not know transports, workers or how one is chosen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from petals_win import __version__
from petals_win.engines.base import (
    ChosenToken,
    Constraint,
    Event,
    Finished,
    GenerationRequest,
    ModelCard,
    Thought,
    Token,
    TokenProbability,
    ToolCallArguments,
    ToolCallBegun,
    Usage,
)
from petals_win.errors import UserError, printable
from petals_win.jobs.failures import BadMessage, LinkRefused, error_in, put_error
from petals_win.jobs.schema import Hello, Question, Reply, Tokens, Weighed

# Raise PROTOCOL when what is sent changes so that a peer of the number before would misread it, and OLDEST when the code
# that still speaks an older one is removed.
PROTOCOL = 1
OLDEST = 1
METHODS = ("Watch", "Generate", "Tokenize", "Detokenize", "Embed")
MOST_BYTES = 16 * 2**20  # of one message: four times the body that the API takes
HEARTBEAT_S = 1.0  # a worker tells its state at least so often
_MOST_MODELS = 1024
_UINT32 = 2**32
_FINITE = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
)
# Fields that are the same on both sides, None being left out.
_PLAIN = (
    *_FINITE,
    "model",
    "continue_final",
    "generation_prompt",
    "min_tokens",
    "ignore_eos",
    "tool_choice",
    "parallel_tool_calls",
    "logprobs",
    "count_along",
)
_REASONS = ("stop", "length", "tool_calls")
T = TypeVar("T")


@dataclass(frozen=True)
class WorkerState:
    """What a worker says of itself: its models, whether its engine is ready and why not, and how much it has to do.

    slots: answers that it computes at once; waiting: those in line behind them. tokens_per_s: of one answer that runs
    alone, prompt_tokens_per_s: of its prompt; each a moving average, None is unknown.
    """

    name: str
    models: tuple[ModelCard, ...]
    ready: bool
    detail: str
    draining: bool = False
    running: int = 0
    waiting: int = 0
    slots: int = 1
    tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None


def hello() -> bytes:
    """What a caller says first."""
    return Hello(protocol=PROTOCOL, oldest=OLDEST, version=__version__).SerializeToString()


def check_hello(data: bytes) -> None:
    """Raises LinkRefused, with a sentence for both sides, if the caller speaks no protocol that this side does."""
    _check_protocol(_read(Hello, data), "the API", "the worker")


def _check_protocol(said: Any, theirs: str, ours: str) -> None:
    if said.oldest > PROTOCOL or said.protocol < OLDEST:
        raise LinkRefused(
            f"{theirs.capitalize()} has petals-win {printable(said.version)[:40] or '?'} and speaks the protocols {said.oldest} to "
            f"{said.protocol}, but {ours} has petals-win {__version__} and speaks {OLDEST} to {PROTOCOL}. Update the older one."
        )


def put_question(request: GenerationRequest, *, special: bool = True) -> bytes:
    """Raises UserError for numbers that no engine has a use for."""
    plain = {name: value for name in _PLAIN if (value := getattr(request, name)) is not None}
    try:
        message = Question(
            **plain,
            template_json=_json(dict(request.template)),
            tools_json=_json(request.tools),
            stop=request.stop,
            stop_tokens=_ids(request.stop_tokens),
            special=special,
        )
        for token, bias in zip(_ids(list(request.logit_bias)), request.logit_bias.values(), strict=True):
            message.logit_bias.add(token=token, bias=bias)
        if request.max_tokens is not None:
            message.max_tokens = min(request.max_tokens, _UINT32 - 1)
        if request.top_k is not None:
            message.top_k = min(request.top_k, _UINT32 - 1)
        if request.seed is not None:
            message.seed = (request.seed + 2**63) % 2**64 - 2**63
        if request.messages is not None:
            message.messages_json = _json(request.messages)
        elif isinstance(request.prompt, str):
            message.prompt_text = request.prompt
        elif request.prompt is not None:
            message.prompt_tokens.ids.extend(_ids(request.prompt))
            message.prompt_tokens.SetInParent()  # it is there also if it is empty
        if request.constraint is not None:
            message.constraint.kind, message.constraint.text = request.constraint.kind, request.constraint.text
    except (TypeError, ValueError) as e:
        raise UserError(f"The request cannot be sent to a worker: {printable(str(e))}") from e
    return _bounded(message.SerializeToString(), "The request")


def question_in(data: bytes) -> tuple[GenerationRequest, bool]:
    """The request, and whether a plain text gets special tokens. Raises BadMessage."""
    message = _read(Question, data)
    given: dict[str, Any] = {name: _set(message, name) for name in _PLAIN}
    for name in _FINITE:
        if given[name] is not None and not math.isfinite(given[name]):
            raise BadMessage(f"{name} is no finite number.")
    prompts = [name for name in ("messages_json", "prompt_text", "prompt_tokens") if message.HasField(name)]
    if len(prompts) != 1:
        raise BadMessage("A question has either messages, a text or token ids.")
    constraint = None
    if message.HasField("constraint"):
        kind = message.constraint.kind
        if kind not in ("json_schema", "regex", "grammar"):
            raise BadMessage("The question has a constraint of an unknown kind.")
        constraint = Constraint(kind, message.constraint.text)
    if not all(math.isfinite(bias.bias) or bias.bias == -math.inf for bias in message.logit_bias):
        raise BadMessage("logit_bias has no finite number.")
    request = GenerationRequest(
        **given,
        messages=_turns(message.messages_json) if message.HasField("messages_json") else None,
        prompt=_prompt(message),
        template=_parsed(message.template_json, dict, "template") if message.template_json else {},
        max_tokens=_set(message, "max_tokens"),
        top_k=_set(message, "top_k"),
        logit_bias={bias.token: bias.bias for bias in message.logit_bias},
        stop=tuple(message.stop),
        stop_tokens=tuple(message.stop_tokens),
        tools=_objects(message.tools_json, "tools") if message.tools_json else (),
        constraint=constraint,
        seed=_set(message, "seed"),
    )
    return request, message.special


def put_tokens(model: str, ids: Sequence[int]) -> bytes:
    """Raises UserError for what is no token id."""
    return _bounded(Tokens(model=model, ids=_ids(ids)).SerializeToString(), "The text")


def tokens_in(data: bytes) -> tuple[str, list[int]]:
    """Raises BadMessage."""
    message = _read(Tokens, data)
    return message.model, list(message.ids)


def put_event(event: Event) -> bytes:
    """An event of an answer as a reply."""
    reply = Reply()
    match event:
        case Token():
            reply.token.text = event.text
            reply.token.ids.extend(event.ids)
            for chosen in event.chosen:
                likeliest = [_weighed(each) for each in chosen.likeliest]
                reply.token.chosen.add(token=_weighed(chosen), likeliest=likeliest)
        case Thought():
            reply.thought = event.text
        case ToolCallBegun():
            reply.call_begun.index, reply.call_begun.id, reply.call_begun.name = event.index, event.id, event.name
            reply.call_begun.SetInParent()
        case ToolCallArguments():
            reply.call_arguments.index, reply.call_arguments.text = event.index, event.text
        case Finished():
            reply.finished.reason = event.reason
            reply.finished.ids.extend(event.ids)
            if event.stop_string is not None:
                reply.finished.stop_string = event.stop_string
        case Usage():
            reply.usage.prompt_tokens, reply.usage.completion_tokens = event.prompt_tokens, event.completion_tokens
            reply.usage.cached_tokens = event.cached_tokens
            reply.usage.SetInParent()
    return reply.SerializeToString()


def put_failure(error: UserError) -> bytes:
    """The error that ends a call, as a reply."""
    reply = Reply()
    put_error(reply.error, error)
    return reply.SerializeToString()


def put_ids(ids: Sequence[int]) -> bytes:
    reply = Reply()
    reply.ids.ids.extend(ids)
    reply.ids.SetInParent()
    return reply.SerializeToString()


def put_text(text: str) -> bytes:
    return Reply(text=text).SerializeToString()


def put_vector(values: Sequence[float]) -> bytes:
    reply = Reply()
    reply.vector.values.extend(values)
    return reply.SerializeToString()


def put_state(state: WorkerState) -> bytes:
    """The state of a worker as a reply, which says hello with it."""
    reply = Reply()
    to = reply.state
    to.hello.protocol, to.hello.oldest, to.hello.version = PROTOCOL, OLDEST, __version__
    to.name, to.ready, to.detail, to.draining = state.name, state.ready, state.detail, state.draining
    to.running, to.waiting, to.slots = state.running, state.waiting, state.slots
    to.tokens_per_s, to.prompt_tokens_per_s = state.tokens_per_s or 0.0, state.prompt_tokens_per_s or 0.0
    for card in state.models:
        to.models.add(id=card.id, created=card.created, context_length=card.context_length)
    return reply.SerializeToString()


def event_in(data: bytes) -> Event:
    """The event that a reply tells. Raises the error that it tells, or BadMessage."""
    reply = _reply(data)
    what = reply.WhichOneof("what")
    match what:
        case "token":
            token = reply.token
            return Token(token.text, tuple(map(_chosen, token.chosen)), tuple(token.ids))
        case "thought":
            return Thought(reply.thought)
        case "call_begun":
            return ToolCallBegun(reply.call_begun.index, reply.call_begun.id, reply.call_begun.name)
        case "call_arguments":
            return ToolCallArguments(reply.call_arguments.index, reply.call_arguments.text)
        case "finished":
            if reply.finished.reason not in _REASONS:
                raise BadMessage("A worker ended an answer for a reason that is not known.")
            return Finished(reply.finished.reason, _set(reply.finished, "stop_string"), tuple(reply.finished.ids))
        case "usage":
            usage = reply.usage
            return Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        case _:
            raise BadMessage("A worker sent what is no event of an answer.")


def check_reply(data: bytes) -> None:
    """Raises the error that a reply tells, if it tells one, or BadMessage."""
    _reply(data)


def ids_in(data: bytes) -> list[int]:
    return list(_wanted(data, "ids").ids)


def text_in(data: bytes) -> str:
    return _wanted(data, "text")


def vector_in(data: bytes) -> list[float]:
    return list(_wanted(data, "vector").values)


def state_in(data: bytes) -> WorkerState:
    """Raises LinkRefused if the worker speaks no protocol that this side does, BadMessage for what makes no sense."""
    said = _wanted(data, "state")
    _check_protocol(said.hello, "the worker", "the API")
    if len(said.models) > _MOST_MODELS:
        raise BadMessage(f"A worker says that it has {len(said.models)} models.")
    speeds = [speed if 0 < speed < math.inf else None for speed in (said.tokens_per_s, said.prompt_tokens_per_s)]
    models = tuple(ModelCard(each.id, each.created, each.context_length) for each in said.models)
    return WorkerState(
        printable(said.name),
        models,
        said.ready,
        printable(said.detail),
        said.draining,
        said.running,
        said.waiting,
        max(said.slots, 1),
        *speeds,
    )


def _read(message_type: Callable[[], T], data: bytes) -> T:
    _bounded(data, "A message")
    message: Any = message_type()
    try:
        message.ParseFromString(data)
    except DecodeError as e:
        raise BadMessage("A message is damaged: it is not what the protocol says.") from e
    return message


def _reply(data: bytes) -> Any:
    """Raises the error that the reply tells, if it is one."""
    reply: Any = _read(Reply, data)
    if reply.WhichOneof("what") == "error":
        raise error_in(reply.error)
    return reply


def _wanted(data: bytes, what: str) -> Any:
    reply = _reply(data)
    if reply.WhichOneof("what") != what:
        raise BadMessage("A worker replied with something else than it was asked for.")
    return getattr(reply, what)


def _set(message: Any, name: str) -> Any:
    """The value of a field; None if it is an optional one that is not set."""
    if message.DESCRIPTOR.fields_by_name[name].has_presence and not message.HasField(name):
        return None
    return getattr(message, name)


def _bounded(data: bytes, what: str) -> bytes:
    if len(data) > MOST_BYTES:
        raise BadMessage(f"{what} has {len(data)} bytes, but may have {MOST_BYTES}.")
    return data


def _ids(ids: Sequence[int]) -> Sequence[int]:
    for token in ids:
        if not 0 <= token < _UINT32:
            raise UserError(f"{token} is no token of any model.")
    return ids


def _prompt(message: Any) -> str | tuple[int, ...] | None:
    if message.HasField("prompt_text"):
        return message.prompt_text
    return tuple(message.prompt_tokens.ids) if message.HasField("prompt_tokens") else None


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _parsed(text: str, kind: type[T], what: str) -> T:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise BadMessage(f"{what} is no JSON.") from e
    if not isinstance(value, kind):
        raise BadMessage(f"{what} is JSON of another kind than it should be.")
    return value


def _objects(text: str, what: str) -> tuple[dict[str, Any], ...]:
    values = _parsed(text, list, what)
    if not all(isinstance(value, dict) for value in values):
        raise BadMessage(f"{what} is no list of objects.")
    return tuple(values)


def _turns(text: str) -> tuple[dict[str, Any], ...]:
    turns = _objects(text, "messages")
    for turn in turns:
        texts: Mapping[str, object] = {"role": "", "content": "", **turn}
        if not (isinstance(texts["role"], str) and isinstance(texts["content"], str | None)):
            raise BadMessage("messages has a turn without a role, or whose content is no text.")
    return turns


def _weighed(each: TokenProbability) -> Any:
    return Weighed(token=each.token, text=each.text, logprob=each.logprob)


def _probability(said: Any) -> tuple[int, bytes, float]:
    if math.isnan(said.logprob):
        raise BadMessage("A worker told a log probability that is no number.")
    return said.token, said.text, said.logprob


def _chosen(said: Any) -> ChosenToken:
    likeliest = tuple(TokenProbability(*_probability(each)) for each in said.likeliest)
    return ChosenToken(*_probability(said.token), likeliest)
