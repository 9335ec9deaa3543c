"""What an answer has to be (JSON of a schema, what a regular expression matches, what a grammar derives), token by token.

Knows llguidance, which tells the tokens that may come next, and what of it a request may cost. Does not know requests, logits or sessions.

Nothing here is trusted. llguidance bounds what a grammar may cost in time and memory, but not how deep one rule stands within another,
each of which takes a piece of the stack of the thread that compiles: that is counted before, and the thread has a deep stack.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from llguidance.hf import from_tokenizer

from petals_win.engines.base import Constraint
from petals_win.engines.json_bounds import JsonBounds, JsonTokens
from petals_win.engines.tokens import Language
from petals_win.errors import UserError

_LONGEST = 2**17  # characters
_DEEPEST = 60  # lists and objects of a schema within each other
_LEVELS = (
    2000  # of those, with what they refer to put in their places; three times as many were too much for the stack
)
_RULES = 1000  # of a grammar
_STACK = 2**24  # bytes
_LEXER_STATES = 50_000  # up to 2 kB each
_LONGEST_REASON = 300  # characters
# JSON in one line, as OpenAI's servers write it: whatever else stands between its parts says nothing, each token of it takes a
# step, and small models go on with it.
_OPTIONS: Any = {"whitespace_pattern": " ?"}
_THOUGHTS_BEGIN, _THOUGHTS_END = "<think>", "</think>"
_TAIL = 8  # tokens; enough for either of those
_VALUES = ("const", "enum", "default", "examples")  # keywords whose values are no schemas
_FORMATS = "date date-time duration email hostname ipv4 ipv6 time uri uuid".split()  # that llguidance knows
# How long a text can be that means something: a fraction of a second has nine digits, and names on the Internet have limits.
_LONGEST_OF_FORMAT = {"date-time": 40, "duration": 40, "time": 40, "email": 254, "hostname": 253}

_WHAT = {
    "json_schema": "The JSON schema cannot be used",
    "regex": "The regular expression cannot be used",
    "grammar": "The grammar, or the JSON schema of a tool, cannot be used",
}


class Constraints:
    """Guides for the answers of one model."""

    def __init__(self, language: Language) -> None:
        self._language = language

    async def guide(self, constraint: Constraint | None, prompt: Sequence[int]) -> AnswerGuide | None:
        """What holds one answer to its constraint; None if it has none. The first of a model takes a second.

        An answer whose prompt ends with the beginning of thoughts is held to it from their end on.
        Raises UserError for a constraint that is wrong, too large, or says what cannot be checked token by token.
        """
        if constraint is None:
            return None
        return await asyncio.wrap_future(_compiling().submit(self._compile, constraint, list(prompt[-_TAIL:])))

    def _compile(self, constraint: Constraint, end: list[int]) -> AnswerGuide:
        """In the thread that compiles. `end` are the last tokens of the prompt."""
        what = _WHAT[constraint.kind]
        try:
            matcher = self._matcher(constraint)
        except ValueError as e:
            raise UserError(f"{what}: {_sentence(str(e))}") from e
        tokenizer = self._language.tokenizer
        thinks = tokenizer.decode(end, skip_special_tokens=False).rstrip().endswith(_THOUGHTS_BEGIN)
        is_json = constraint.kind == "json_schema" or constraint.kind == "grammar" and "%json" in constraint.text
        bounds = JsonBounds(self._json_tokens) if is_json else None
        return AnswerGuide(matcher, self._language, what, tokenizer if thinks else None, bounds)

    def _matcher(self, constraint: Constraint) -> LLMatcher:
        """Raises ValueError."""
        text = constraint.text
        if len(text) > _LONGEST:
            raise ValueError(f"it has {len(text)} characters, and {_LONGEST} are the most")
        table = self._table
        if constraint.kind == "json_schema":
            schema = as_understood(_parsed(text))
            return _matcher_of(table, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
        if constraint.kind == "regex":
            return _matcher_of(table, LLMatcher.grammar_from_regex(text))
        lark = _as_lark(text)
        for schema in _schemas_within(lark):
            _check_depth(schema)
        return _matcher_of(table, LLMatcher.grammar_from_lark(lark))

    @functools.cached_property
    def _json_tokens(self) -> JsonTokens:
        return JsonTokens(self._table, self._language.vocabulary)

    @functools.cached_property
    def _table(self) -> LLTokenizer:
        """The bytes of all tokens, in the order in which texts are looked up. Raises ValueError."""
        tokenizer, ends = self._language.tokenizer, sorted(self._language.ends)
        if not ends:
            raise ValueError("this model has no token that ends an answer")
        try:
            tokens = max(self._language.vocabulary, len(tokenizer))
            return from_tokenizer(tokenizer, n_vocab=tokens, eos_token=ends)
        except Exception as e:  # whatever it does not know of this kind of tokenizer
            raise ValueError(f"it cannot be told which text the tokens of this model stand for ({e})") from e


class AnswerGuide:
    """Implements Guide for one answer: what may come next is computed in another thread while a step is away."""

    def __init__(
        self, matcher: LLMatcher, language: Language, what: str, thinking: Any | None, bounds: JsonBounds | None
    ) -> None:
        """`thinking` is the tokenizer, if the answer begins with thoughts. Raises UserError if nothing can be the answer."""
        self._matcher, self._vocabulary, self._what, self._bounds = matcher, language.vocabulary, what, bounds
        self._thinking, self._thoughts = thinking, list[int]()
        self._next: Future[torch.Tensor] = Future()
        self._next.set_result(self._forbidden())

    def forbidden(self) -> torch.Tensor | None:
        """As Guide.forbidden: UserError for what turns out to be impossible, or too much to keep track of."""
        return None if self._thinking is not None else self._next.result()

    def took(self, token: int) -> None:
        if self._thinking is None:
            self._next = _looking_ahead().submit(self._follow, token)
            return
        self._thoughts = [*self._thoughts[1 - _TAIL :], token]
        if _THOUGHTS_END in self._thinking.decode(self._thoughts, skip_special_tokens=False):
            self._thinking = None

    def _follow(self, token: int) -> torch.Tensor:
        self._matcher.consume_token(token)
        if self._bounds is not None:
            self._bounds.took(token)
        return self._forbidden()

    def _forbidden(self) -> torch.Tensor:
        """bool [vocabulary]"""
        bias = bytearray(self._matcher.compute_logit_bias())
        # What cannot go on looks like what is complete, but for this.
        if self._matcher.is_error():
            dead = self._matcher.stop_reason() == "NoExtensionBias"
            raise UserError(f"{self._what}: {_sentence('NoExtensionBias' if dead else self._matcher.get_error())}")
        forbidden = torch.frombuffer(bias, dtype=torch.uint8)[: self._vocabulary] == 0
        for unwanted in self._bounds.unwanted() if self._bounds is not None else ():
            if not (more := forbidden | unwanted).all():
                return more
        return forbidden


@functools.cache
def _looking_ahead() -> ThreadPoolExecutor:
    """Two threads, so that an answer whose grammar takes long does not keep the others from going on."""
    return ThreadPoolExecutor(2, thread_name_prefix="constraints")


@functools.cache
def _compiling() -> ThreadPoolExecutor:
    """One thread, with a stack as deep as compiling needs it."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="compiling")
    usual = threading.stack_size(_STACK)
    try:
        pool.submit(int).result()  # which starts the thread
    finally:
        threading.stack_size(usual)
    return pool


def _matcher_of(table: LLTokenizer, grammar: str) -> LLMatcher:
    limits = LLParserLimits(max_lexer_states=_LEXER_STATES, verbose_errors=False)
    matcher = LLMatcher(table, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def _parsed(text: str) -> Any:
    """JSON. Raises ValueError."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("too much stands within each other") from None


def as_understood(schema: Any) -> Any:
    """A JSON schema as llguidance is to read it, which says how the JSON is written, too.

    Formats that are not known here are left out: by JSON Schema's rules those say nothing about what is valid. Texts of those
    that are known get a bound where they have none.
    Raises ValueError for what is no object, or too deep.
    """
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema is an object")
    _check_depth(schema)
    return {**_with_known_formats(schema), "x-guidance": _OPTIONS}


def _with_known_formats(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_known_formats(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    understood = {
        key: value if key in _VALUES else _with_known_formats(value)
        for key, value in schema.items()
        if key != "format" or not isinstance(value, str) or value in _FORMATS
    }
    if (longest := _longest_of(schema.get("format"))) and not schema.keys() & {"minLength", "maxLength"}:
        understood["maxLength"] = longest
    return understood


def _longest_of(format_name: Any) -> int | None:
    return _LONGEST_OF_FORMAT.get(format_name) if isinstance(format_name, str) else None


def _check_depth(schema: Any) -> None:
    """Raises ValueError for a schema in which so much stands within each other that it would take too deep a stack.

    Whatever is referred to is compiled within what refers to it, once. The sum of all of it is more than the depth can be.
    """
    levels = _depth(schema) + sum(_depth(_resolved(schema, reference)) for reference in set(_references(schema)))
    if levels > _LEVELS:
        raise ValueError(f"with all that its $ref refer to it has {levels} levels, and {_LEVELS} are the most")


def _depth(value: Any) -> int:
    """How many lists and objects stand within each other. Raises ValueError if that is too many."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} lists and objects stand within each other")
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
    return depth


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            if key in ("$ref", "$dynamicRef", "$recursiveRef") and isinstance(part, str):
                yield part
            yield from _references(part)
    elif isinstance(value, list):
        for part in value:
            yield from _references(part)


def _resolved(schema: Any, reference: str) -> Any:
    """What a reference such as "#/$defs/a" refers to; the whole, if it is written in another way."""
    found, parts = schema, reference.split("/")
    if parts[0] != "#":
        return schema
    for part in parts[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return schema
    return found


def _as_lark(text: str) -> str:
    """A grammar in Lark's notation, of one in that or in GBNF, llama.cpp's. Raises ValueError."""
    rules = sum(":" in line for line in text.splitlines())
    if rules > _RULES:
        raise ValueError(f"it has {rules} rules, and {_RULES} are the most")
    try:
        return any_to_lark(text)
    except RecursionError:
        raise ValueError("too much stands within each other") from None
    except Exception as e:  # of a class of its own
        raise ValueError(str(e)) from e


def _schemas_within(lark: str) -> Iterator[Any]:
    """The JSON schemas in a grammar in Lark's notation. Raises ValueError."""
    for directive in re.finditer(r"%json\s*", lark):
        try:
            yield json.JSONDecoder().raw_decode(lark, directive.end())[0]
        except RecursionError:
            raise ValueError("too much stands within each other") from None


def _sentence(reason: str) -> str:
    """What llguidance says, as the end of a sentence, with the keyword that it is about."""
    if missing := re.search(r"Unimplemented keys: \[(.*)\]", reason):
        return f"{missing[1].replace(chr(34), '')} cannot be held to here. Leave it out."
    if reason.startswith("NoExtensionBias"):
        return "nothing fits it."
    if reason.startswith(("Resource ", "Pointer ", "circular ")):
        reason = f"$ref: {reason}"
    if "regex parse error" in reason:
        reason = "in a pattern, " + reason.rpartition("error:")[2].strip()
    first = next((line.strip() for line in reason.splitlines() if line.strip()), "it is not known why")
    first = first.partition(" Enable 'coerce_one_of'")[0]
    return first[:_LONGEST_REASON].rstrip(".;: ") + "."
