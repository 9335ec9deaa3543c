"""A scripted fake of an engine: no model, no swarm. It stands in where a test is about HTTP and not about answers.

One word is one token. What it does depends on the last message or prompt:

    "say WORDS"        answers WORDS
    "count N"          answers "1 2 3 ... N", one token every `pace` seconds
    "wait"             computes for ever and never gets to its first token
    "break" "crash"    two tokens, then the swarm fails, or the engine itself does
    "missing"          the swarm cannot begin
    "recall N"         answers "You said: ...", and N tokens of the prompt were there from before
    "think A | B"      thinks A and answers B
    "call NAME ARGUMENTS … | A"   answers A, which may be missing, and calls tools, each with arguments without blanks
    "... </s>"         an answer ends there, and ~ is a token without text
    anything else      answers "You said: ..."

With a `script`, the events of its answer are these, and then the counts; the prompt does not matter.
"""

import asyncio
import math
import re
import zlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from petals_win.engines.base import (
    ChosenToken,
    ContextTooLong,
    EngineClosed,
    Event,
    Finished,
    GenerationRequest,
    ModelCard,
    ModelNotFound,
    PeerStatus,
    SwarmFull,
    SwarmStatus,
    SwarmUnavailable,
    Thought,
    Token,
    TokenProbability,
    ToolCallArguments,
    ToolCallBegun,
    Usage,
)
from petals_win.engines.stopping import StopStrings
from petals_win.errors import UserError

MODEL = "made-up/fake-model"
BEGIN, END = 100_000, 100_001  # ids below them are of words that nobody knows
_WORDS = re.compile(r"</?s>|\s*[^\s<]+|\s*<|\s+")


class FakeEngine:
    def __init__(self, pace: float = 0.001, missing_blocks: tuple[int, ...] = (), model: str = MODEL):
        self.model = model
        self.pace = pace
        self.missing_blocks = missing_blocks
        self.context_length = 2000
        self.requests: list[GenerationRequest] = []
        self.tokenized: list[tuple[GenerationRequest, bool]] = []
        self.running = 0
        self.most_running = 0
        self.completed = 0
        self.cancelled = 0
        self.closed = 0
        self.full = False
        self.script: list[Event] = []
        self._closing = asyncio.Event()
        self._tokens = {"<s>": BEGIN, "</s>": END}
        self._texts = list(self._tokens)

    async def start(self, on_lost: Callable[[UserError], None]) -> None:
        """It is never lost."""

    def models(self) -> list[ModelCard]:
        return [ModelCard(self.model, 1_700_000_000, self.context_length)]

    def status(self) -> SwarmStatus:
        peers = (PeerStatus("12D3KooWFakePeer", 0, 15, "gaming-pc", 123.5, 4096, False),)
        if self.missing_blocks:
            return SwarmStatus(False, "No node serves blocks 15:30.", self.missing_blocks, peers, num_blocks=30)
        return SwarmStatus(True, "All 30 blocks are served by 2 nodes.", (), peers, num_blocks=30)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.closed:
                raise EngineClosed()
            if request.model != self.model:
                raise ModelNotFound(request.model, [self.model])
            if self.script:
                for event in self.script:
                    await asyncio.sleep(self.pace)
                    yield event
                yield Usage(7, len(self.script), 3)
                self.completed += 1
                return
            text = request.messages[-1]["content"] if request.messages else request.prompt
            words = self._words_of(text) if isinstance(text, tuple) else str(text).split()
            length = len(text) if isinstance(text, tuple) else len(words)
            if length >= self.context_length:
                raise ContextTooLong(length, self.context_length)
            if self.full:
                raise SwarmFull("All places are taken.")
            order = words[0] if words else ""
            if order == "missing":
                raise SwarmUnavailable(range(15, 30))
            if order == "wait":
                await asyncio.wait_for(self._closing.wait(), 600)
                raise EngineClosed()
            before: list[str] = []
            match order:
                case "say":
                    answer = words[1:]
                case "count":
                    answer = [str(n) for n in range(1, int(words[1]) + 1)]
                case "break" | "crash":
                    answer = ["two", "tokens"]
                case "think" | "call":
                    bar = words.index("|") if "|" in words else len(words)
                    before, answer = words[1:bar], words[bar + 1 :]
                case _:
                    answer = ["You", "said:", *words]
            if request.seed is not None:
                answer.append(str(zlib.crc32(repr((answer, request.seed)).encode())))
            cached = int(words[1]) if order == "recall" else 0
            for word in before if order == "think" else ():
                yield Thought(f"{word} ")
            async for event in self._speak(answer, request, Usage(length, 0, cached)):
                if isinstance(event, Finished) and order == "break":
                    raise SwarmUnavailable(range(15, 30))
                if isinstance(event, Finished) and order == "crash":
                    raise RuntimeError("scripted defect")
                if isinstance(event, Finished) and order == "call":
                    for call in _calls(before):
                        yield call
                    event = Finished("tool_calls")
                yield event
            self.completed += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def _words_of(self, tokens: tuple[int, ...]) -> list[str]:
        """Those of the last line of a text; with ids that are no words, what stands for these."""
        if any(token < BEGIN for token in tokens):
            return [f"#{token}" for token in tokens]
        return self.text_of(tokens).removeprefix("<s>").rpartition("\n")[2].split()

    async def _speak(self, words: list[str], request: GenerationRequest, usage: Usage) -> AsyncGenerator[Event, None]:
        stops = StopStrings(request.stop)
        room = self.context_length - usage.prompt_tokens
        limit = min(room, len(words) if request.max_tokens is None else request.max_tokens)
        count, ended = 0, False
        untold: list[int] = []
        told = _Told(request.logprobs)
        for word in words[:limit]:
            await asyncio.sleep(self.pace)
            if self.closed:
                raise EngineClosed()
            count += 1
            text = word if count == 1 or word == "</s>" else f" {word}"
            untold.append(self._id(text))
            if ended := untold[-1] in (END, *request.stop_tokens):
                break
            text = "" if word == "~" else text
            told.came(count, text)
            if piece := stops.feed(text):
                if request.count_along:
                    yield replace(usage, completion_tokens=count)
                yield Token(piece, told.shown(piece), tuple(untold))
                untold.clear()
            if stops.stopped:
                break
        if rest := stops.flush():
            yield Token(rest, told.shown(rest), tuple(untold))
            untold.clear()
        whole = stops.stopped or ended or limit >= len(words)
        yield Finished("stop" if whole else "length", stops.met, tuple(untold))
        yield replace(usage, completion_tokens=count)

    async def tokenize(self, request: GenerationRequest, *, special: bool = True) -> list[int]:
        """One token for each word, with the blank before it; there are no special ones."""
        self._check(request.model)
        self.tokenized.append((request, special))
        if isinstance(request.prompt, tuple):
            return list(request.prompt)
        text = request.messages[-1]["content"] if request.messages else request.prompt
        return [self._id(word) for word in _WORDS.findall(str(text))]

    async def detokenize(self, model: str, tokens: Sequence[int]) -> str:
        self._check(model)
        return self.text_of(tokens)

    def text_of(self, tokens: Sequence[int]) -> str:
        if unknown := [token for token in tokens if not 0 <= token - BEGIN < len(self._texts)]:
            raise UserError(f"{self.model} has no token {unknown[0]}.")
        return "".join(self._texts[token - BEGIN] for token in tokens)

    async def embed(self, model: str, tokens: Sequence[int]) -> list[float]:
        """Where in the vocabulary its words are; "wait" computes for ever."""
        self._check(model)
        if not tokens:
            raise UserError("The text is empty.")
        if len(tokens) > self.context_length:
            raise ContextTooLong(len(tokens), self.context_length)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await asyncio.sleep(self.pace)
            if tokens[-1] == self._tokens.get("wait"):
                await asyncio.wait_for(self._closing.wait(), 600)
                raise EngineClosed()
            weights = [sum(tokens) % 101 + 1, len(tokens), tokens[-1] - BEGIN + 1]
            length = math.hypot(*weights)
            return [weight / length for weight in weights]
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def _id(self, word: str) -> int:
        """The id of a word, the same for as long as the engine lives."""
        if word not in self._tokens:
            self._tokens[word] = BEGIN + len(self._texts)
            self._texts.append(word)
        return self._tokens[word]

    def _check(self, model: str) -> None:
        if self.closed:
            raise EngineClosed()
        if model != self.model:
            raise ModelNotFound(model, [self.model])

    async def close(self) -> None:
        self.closed += 1
        self._closing.set()


def _calls(words: list[str]) -> list[Event]:
    """Each call begins, and then come its arguments in two pieces."""
    events: list[Event] = []
    for index, (name, arguments) in enumerate(zip(words[::2], words[1::2], strict=True)):
        events.append(ToolCallBegun(index, f"call_{index}", name))
        events += [ToolCallArguments(index, part) for part in (arguments[:3], arguments[3:]) if part]
    return events


class _Told:
    """Log probabilities in step with a text that is held back; characters that UTF-16 needs two of are two tokens."""

    def __init__(self, likeliest: int | None):
        self._likeliest = likeliest
        self._held: list[tuple[int, ChosenToken]] = []
        self._length = self._shown = 0

    def came(self, number: int, text: str) -> None:
        data = text.encode()
        for part in (data[:-2], data[-2:]) if text[-1:] > "\uffff" else (data,):
            others = [TokenProbability(number, part, -number / 8), TokenProbability(0, b"\xff", -9.0)]
            others += [TokenProbability(each, b"t%d" % each, float("-inf")) for each in range(1000, 1020)]
            if self._likeliest is not None:
                chosen = ChosenToken(number, part, -number / 8, tuple(others[: self._likeliest]))
                self._held.append((self._length, chosen))
        self._length += len(text)

    def shown(self, piece: str) -> tuple[ChosenToken, ...]:
        self._shown += len(piece)
        told = tuple(chosen for begin, chosen in self._held if begin < self._shown)
        del self._held[: len(told)]
        return told
