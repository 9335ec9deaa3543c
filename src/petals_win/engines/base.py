"""What an engine is: the one protocol between whatever computes tokens and whatever shows them.

Knows the request, the events of an answer, the state of a swarm and the errors that a user can cause.
Does not know HTTP, tokenizers, swarms or tensors.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from petals_win.errors import UserError


@dataclass(frozen=True)
class ModelCard:
    """A model that can be asked for: its public name, Unix time of loading (s), longest prompt plus answer (tokens).

    The context is the model's, or what the nodes that serve it have room for, if that is less. It may be asked for by its
    aliases, too, or by any name at all.
    """

    id: str
    created: int
    context_length: int
    aliases: tuple[str, ...] = ()
    any_name: bool = False


@dataclass(frozen=True)
class PeerStatus:
    """One node of the swarm and the half-open range of blocks [start, end) that it serves.

    throughput: tokens per second of one block, as the node says; cache_tokens_left: what it has room for; relayed: whether
    it is reached through another PC. None is unknown.
    """

    peer_id: str
    start_block: int
    end_block: int
    name: str | None = None
    throughput: float | None = None
    cache_tokens_left: int | None = None
    relayed: bool | None = None


@dataclass(frozen=True)
class WorkerStatus:
    """One of several workers that answer questions by themselves, where there are such.

    address: as the user named it. state: "waiting" for what its own engine lacks; "gone", "refused" and "draining" take no
    questions. detail: a sentence. running, waiting: its answers, and those in line; slots: how many it computes at once.
    tokens_per_s: of one answer alone. None is unknown.
    """

    address: str
    state: Literal["ready", "waiting", "draining", "gone", "refused"]
    detail: str
    name: str | None = None
    models: tuple[str, ...] = ()
    running: int = 0
    waiting: int = 0
    slots: int = 0
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class EngineStatus:
    """One of the engines behind an API: its name as --engine has it, its models, and whether they are in memory.

    detail: a sentence. ready: it can answer, be it after loading. running, waiting: questions that it answers, and that wait until
    it is loaded. The rest is as in SwarmStatus.
    """

    engine: str
    models: tuple[str, ...]
    state: Literal["loaded", "loading", "unloaded", "failed"]
    detail: str
    ready: bool
    running: int = 0
    waiting: int = 0
    num_blocks: int = 0
    missing_blocks: tuple[int, ...] = ()
    peers: tuple[PeerStatus, ...] = ()
    cache_usage: float | None = None


@dataclass(frozen=True)
class SwarmStatus:
    """Whether a prompt could be answered now, and if not, what is missing. `detail` is one sentence for people.

    num_blocks: of the model. cache_usage: the share of this PC's own memory for conversations that is in use, from 0 to 1;
    None where nodes have it. Of several engines, blocks are those of the first one that a swarm has, and peers those of all.
    """

    ready: bool
    detail: str
    missing_blocks: tuple[int, ...] = ()
    peers: tuple[PeerStatus, ...] = ()
    num_blocks: int = 0
    cache_usage: float | None = None
    workers: tuple[WorkerStatus, ...] = ()
    engines: tuple[EngineStatus, ...] = ()


@dataclass(frozen=True)
class Constraint:
    """What the text of an answer has to be: JSON that fits a schema (its own JSON), what a regular expression matches, or
    what a grammar (in Lark's notation) derives."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt and how to continue it. Exactly one of `messages` and `prompt` is given.

    messages: for each turn role (system, user, assistant or tool) and content (text), and where the turn has them
    name, reasoning_content, tool_call_id and tool_calls (a list of {"id", "type": "function", "function": {"name",
    "arguments"}}, the arguments an object unless they were no JSON). The engine applies the model's chat template.
    template: further variables of the chat template, such as {"enable_thinking": False}.
    continue_final: go on with the text of the last message instead of beginning a turn.
    generation_prompt: begin the assistant's turn after the messages; of no effect with continue_final.
    prompt: plain text, or token ids, continued as it stands.
    max_tokens: longest answer in tokens; None, or more than fits: up to the end of the model's context.
    min_tokens: the answer's turn does not end before so many tokens. ignore_eos: it does not end by itself at all.
    temperature, top_p, top_k, min_p, repetition_penalty: None is the model's own default; temperature 0 is greedy,
    top_p 1, top_k 0, min_p 0 and repetition_penalty 1 do nothing.
    frequency_penalty, presence_penalty: taken off a token's logit for each time, or if ever, that it was generated.
    logit_bias: token id to what is added to its logit before anything else.
    stop: the answer ends before the first of these strings (`petals_win.engines.stopping.StopStrings` does it).
    stop_tokens: ids of tokens that end the answer, too; they are not part of its text.
    tools: functions that the model may call, each {"type": "function", "function": {"name", "description", "parameters"}}.
    tool_choice: "auto"; "none"; "required", at least one call; or the name of the one to call.
    parallel_tool_calls: whether the answer may have several calls.
    constraint: what the text of the answer has to be; None: anything.
    logprobs: tell with each token its log probability, and those of so many of the likeliest ones; None: do not.
    count_along: a Usage, with the counts so far, comes before each piece of the answer, too.
    seed: the same request with the same seed gives the same answer; None draws anew.
    """

    model: str
    messages: tuple[dict[str, Any], ...] | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    continue_final: bool = False
    generation_prompt: bool = True
    prompt: str | tuple[int, ...] | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    constraint: Constraint | None = None
    logprobs: int | None = None
    count_along: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("a request has either messages or a prompt")


@dataclass(frozen=True)
class TokenProbability:
    """A token that could come next: its id, its bytes (of which a character may need several tokens'), and the natural
    logarithm of its probability."""

    token: int
    text: bytes
    logprob: float


@dataclass(frozen=True)
class ChosenToken(TokenProbability):
    """A token of the answer. `likeliest` are the most likely ones at its place, the likeliest first."""

    likeliest: tuple[TokenProbability, ...] = ()


@dataclass(frozen=True)
class Token:
    """The next piece of the answer: whole characters, never half of a multi-byte one; one token or several.

    chosen: the tokens whose text begins in this piece, if the request asks for log probabilities. Those without a text,
    such as the end of a turn, are left out.
    ids: those of all tokens since the last Token, some of which may have no text. The same text counts as the same event.
    """

    text: str
    chosen: tuple[ChosenToken, ...] = ()
    ids: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Thought:
    """The next piece of what a model that thinks writes before its answer."""

    text: str


@dataclass(frozen=True)
class ToolCallBegun:
    """The model calls a tool: call number `index` of the answer, counted from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """The next piece of the arguments of call number `index`; all of them joined are a JSON object, if the model wrote one."""

    index: int
    text: str


@dataclass(frozen=True)
class Finished:
    """The answer is complete: "stop" (end of turn or a stop string), "length" (max_tokens or end of context), or
    "tool_calls" (end of a turn in which the model calls tools).

    stop_string: the one that ended it, if one did. ids: those of the tokens after the last Token: what ended the answer, and
    what is no whole character. With those of all Tokens before, they are the answer's tokens.
    """

    reason: Literal["stop", "length", "tool_calls"]
    stop_string: str | None = None
    ids: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Usage:
    """How many tokens the prompt had (chat template included) and how many were generated.

    cached_tokens: of the prompt, those at its beginning that an earlier request had left computed.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = field(default=0, compare=False)  # the same answer, however much of it was new


Event = Token | Thought | ToolCallBegun | ToolCallArguments | Finished | Usage


class Engine(Protocol):
    """Computes answers. All methods are called on one event loop, and `generate` several times at once."""

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        """Begin to follow the state of what answers; returns after the first look. To be called once, before the rest.

        `on_lost` is called, on any thread, as soon as it is known that the engine will never answer again, and why.
        """
        ...

    def models(self) -> list[ModelCard]:
        """The models that can be asked for. Answers from memory, without waiting."""
        ...

    def status(self) -> SwarmStatus:
        """The last known state of the swarm. Answers from memory, without waiting."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Yield any number of Token, Thought, ToolCallBegun and ToolCallArguments, then one Finished, then one Usage.

        (An `async def` with `yield`.) Between them there is a Usage only if the request wants to have tokens counted along.

        Whoever consumes it may stop at any point, by `aclose()` or by being cancelled: the computation ends
        then, at the latest after the token in work, and everything held for it is released before `aclose()` returns.

        Raises ModelNotFound and ContextTooLong before the first event, as any other UserError about the request
        (a token id that the model does not have, a conversation that its chat template refuses); SwarmUnavailable,
        Full, SwarmFailed and SwarmRefused at any time; EngineClosed if `close` was called before the answer was
        complete. An exception that is no UserError is a defect of the engine.
        """
        ...

    async def tokenize(self, request: GenerationRequest, *, special: bool = True) -> list[int]:
        """The token ids of the request's prompt, as `generate` would read them; none for an empty text.

        special: whether a plain text gets the tokens that the tokenizer puts around one. Answers without computing.
        Raises ModelNotFound, any other UserError about the prompt except that it is too long, and UserError if this engine
        knows text alone.
        """
        ...

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        """The text of token ids, with that of special tokens. Raises ModelNotFound, UserError for ids that it does not have."""
        ...

    async def embed(self, model: str, tokens: Sequence[int]) -> list[float]:
        """What the model makes of a text, as a vector of length 1: the mean of the final hidden states of its tokens.

        May be cancelled as `generate`. Raises what `generate` raises, and UserError if this engine has no hidden states.
        """
        ...

    async def close(self) -> None:
        """Cancel what is running and release everything. May be called twice."""
        ...


@runtime_checkable
class Loads(Protocol):
    """What an Engine does beside that loads models when somebody asks for them."""

    async def load(self, model: str) -> None:
        """Returns when the model is in memory, which it may leave again. `generate` does it by itself, but holds a place meanwhile.

        Who is cancelled does not stop the loading. Raises ModelNotFound, EngineClosed, Full, and SwarmUnavailable if it fails.
        """
        ...

    def keep(self, model: str, seconds: float) -> None:
        """Until it is unloaded, the model may be idle for so long (s), or for ever (inf). Of no effect on one that always stays."""
        ...

    def expires(self) -> dict[str, float]:
        """The models that are in memory, and the seconds until each is unloaded if nobody asks for it; inf: never."""
        ...


class ModelNotFound(UserError):
    """The request names a model that this engine does not have."""

    def __init__(self, model: str, available: Sequence[str]):
        super().__init__(
            f"There is no model {model[:100]!r} here. Ask for one of: {', '.join(available) or '(none)'}."
        )
        self.model = model


class EngineClosed(UserError):
    """The engine was closed before the answer was complete."""

    def __init__(self) -> None:
        super().__init__("petals-win is ending, so this was not answered. Start it again, and ask once more.")


class ContextTooLong(UserError):
    """The prompt leaves no room for an answer in the model's context."""

    def __init__(self, prompt_tokens: int, context_length: int):
        super().__init__(
            f"The prompt has {prompt_tokens} tokens, but prompt and answer together may have {context_length}. "
            "Shorten it, or start a new chat."
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class Full(UserError):
    """All that the answer needs is there, but had no room for it in time."""


class SwarmFull(Full):
    """All nodes that the answer needs are there, but they had no room for it in time. `reason` is a node's own sentence."""

    def __init__(self, reason: str):
        super().__init__(
            f"The swarm is full: {reason} Try again in a moment, or add a PC with 'petals-win serve' for the same blocks."
        )


class SwarmRefused(UserError):
    """A node of the swarm does not do what the request needs. `reason` is its own sentence."""

    def __init__(self, reason: str):
        super().__init__(f"A PC of the swarm refused the request: {reason}")


class SwarmFailed(UserError):
    """Nodes that are there failed again and again at this answer. `reason` is what the last one said."""

    def __init__(self, reason: str):
        super().__init__(
            f"A PC of the swarm failed, and no other could take its place: {reason} The log of that PC tells more; try again."
        )


class SwarmUnavailable(UserError):
    """No node serves some of the model's blocks, or none of those that do could be reached."""

    def __init__(self, missing_blocks: Sequence[int]):
        where = f"blocks {block_ranges(missing_blocks)}" if missing_blocks else "some of the blocks"
        super().__init__(
            f"The swarm cannot answer now: no reachable PC serves {where} of the model. "
            "Start 'petals-win serve' for them on another PC, or try again when the missing PC is back."
        )
        self.missing_blocks = tuple(missing_blocks)


def find_model(asked: str, cards: Sequence[ModelCard]) -> ModelCard:
    """The model that is meant: its name in any case, with or without its owner ("owner/name"), if that is only one, or an alias.

    Raises ModelNotFound.
    """
    for card in cards:
        if card.id == asked or asked.lower() in (alias.lower() for alias in card.aliases):
            return card
    owner, _, name = asked.lower().rpartition("/")
    found = []
    for card in cards:
        its_owner, _, its_name = card.id.lower().rpartition("/")
        # A model from a file has no owner: any that is asked for fits.
        if name == its_name and (not owner or not its_owner or owner == its_owner):
            found.append(card)
    if len(found) != 1:
        found = [card for card in cards if card.any_name]
    if len(found) != 1:
        raise ModelNotFound(asked, [name for card in cards for name in (card.id, *card.aliases)])
    return found[0]


class SwarmOutOfReach(SwarmUnavailable):
    """This process has lost its way into the swarm, or cannot find out who serves what; `reason` is a sentence."""

    def __init__(self, reason: str):
        UserError.__init__(self, reason)
        self.missing_blocks = ()


def block_ranges(blocks: Sequence[int]) -> str:
    """Block numbers as half-open ranges, written as `--blocks` takes them: [0, 1, 2, 7] is "0:3, 7:8"."""
    ranges: list[list[int]] = []
    for block in sorted(blocks):
        if ranges and block == ranges[-1][1]:
            ranges[-1][1] = block + 1
        else:
            ranges.append([block, block + 1])
    return ", ".join(f"{start}:{end}" for start, end in ranges)
