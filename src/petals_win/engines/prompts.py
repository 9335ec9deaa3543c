"""From a request to token ids: the chat template, the turn that is continued, the token that begins a text.

Knows tokenizers and what chat templates can show. Does not know how tokens are computed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from petals_win.engines.base import GenerationRequest
from petals_win.engines.formats.answer import AnswerParser
from petals_win.engines.formats.table import AnswerFormat
from petals_win.errors import UserError

_LONGEST_REASON = 300  # characters of what a template says
_BLANKS = " \t"
_END = 8  # tokens; enough for some text before the answer

# How tools are told to a model whose template knows none.
_CALL = "<tool_call>\n{}\n</tool_call>"
_TELLS = "You can call tools"
_TOOLS = (
    _TELLS + ": write a JSON object with name and arguments between tags, a block for each call, and wait for the "
    "results.\n{call}\nThe tools, each with the JSON schema of its arguments:\n{tools}"
)


@dataclass(frozen=True)
class Prompt:
    """What the model reads, and how the answer joins on to it.

    tokens: the token ids. before: the last of them, if the answer goes on with their text and does not begin a turn.
    blanks: with what the caller's text ends, though not the tokens: the answer may repeat it.
    parser: what tells thoughts and calls of tools from the answer's text, for this one answer; None: all of it is text.
    """

    tokens: list[int]
    before: list[int]
    blanks: str
    parser: AnswerParser | None = None


class PromptEncoder:
    """Token ids for the requests to one model. `vocabulary` is how many tokens it has."""

    def __init__(self, name: str, tokenizer: Any, vocabulary: int):
        self._name = name
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._format = AnswerFormat.of(tokenizer)
        # Of the added tokens that are not special, those that make up the template's turns.
        tokenizer.chat_control_tokens = sorted(self._format.turns)

    def encode(self, request: GenerationRequest) -> Prompt:
        """The prompt of a request. Raises UserError if it is empty, or what the model or its template does not take."""
        continued, blanks, parser = True, "", None
        if request.messages is not None:
            tokens, continued, blanks, parser = self._conversation(request, request.messages)
        elif isinstance(request.prompt, str):
            tokens = self.plain(request.prompt)
        else:
            tokens = list(request.prompt or ())
        if not tokens:
            raise UserError("The prompt is empty. Send at least one token of text.")
        self.check(tokens)
        return Prompt(tokens, self._end_of(tokens) if continued else [], blanks, parser)

    def check(self, tokens: Sequence[int]) -> None:
        """Raises UserError for token ids that the model does not have."""
        if unknown := [token for token in tokens if not 0 <= token < self._vocabulary]:
            raise UserError(
                f"{self._name} has the tokens 0 to {self._vocabulary - 1}, but the prompt has {unknown[0]}."
            )

    def _end_of(self, tokens: list[int]) -> list[int]:
        """The last tokens, but none if they end within a character: text can go on behind a whole one only."""
        end = tokens[-_END:]
        return [] if self._tokenizer.decode(end, skip_special_tokens=True).endswith("\ufffd") else end

    def plain(self, text: str, *, special: bool = True) -> list[int]:
        """A text as it stands, with the tokens that the tokenizer puts around one unless `special` is false.

        Where it begins with the BOS token itself, the tokenizer must not add another one.
        """
        as_it_stands = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not special or (as_it_stands and as_it_stands[0] == self._tokenizer.bos_token_id):
            return as_it_stands
        return self._tokenizer(text)["input_ids"]

    def as_text(self, request: GenerationRequest) -> str:
        """The prompt of a request for whoever reads text as this tokenizer does, which puts the first token there itself.

        Raises UserError as `encode` does, and for a control token that somebody has typed: in a text it would be one.
        """
        if request.messages is None:
            return str(request.prompt)
        rendered = self._turns(request, request.messages).rendered
        if any(map(self._format.has_typed, _texts((*rendered.messages, rendered.tools)))):
            raise UserError(
                f"{self._name} would take what stands in a message for a control token. Write it in another way."
            )
        begins = self._tokenizer("")["input_ids"][:1] == [self._tokenizer.bos_token_id]
        return rendered.text.removeprefix(self._tokenizer.bos_token) if begins else rendered.text

    def _conversation(
        self, request: GenerationRequest, messages: Sequence[dict[str, Any]]
    ) -> tuple[list[int], bool, str, AnswerParser | None]:
        """Token ids, whether the last turn is continued, the blanks at its end, which are left out, and what reads the answer."""
        turns = self._turns(request, messages)
        rendered = turns.rendered
        try:
            tokens = self._tokens(rendered, turns.how)
        except Exception as e:
            raise self._not_taken(e) from e
        parser = self._format.parser(
            () if request.tool_choice == "none" else request.tools,
            plain=rendered.told or request.tool_choice not in ("auto", "none"),
            parallel=request.parallel_tool_calls,
            prompt=rendered.text,
            continued=turns.messages[-1]["content"] if turns.continued else "",
        )
        return tokens, turns.continued, turns.blanks, parser

    def _turns(self, request: GenerationRequest, messages: Sequence[dict[str, Any]]) -> _Turns:
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{self._name} was not made for chats: it has no chat template. Send a prompt to /v1/completions instead."
            )
        messages, continued, begun, blanks = list(messages), request.continue_final, request.generation_prompt, ""
        if continued:
            text = messages[-1]["content"]
            # Models write a blank and the word behind it as one token, so a blank at the end would stand alone.
            kept = text.rstrip(_BLANKS)
            blanks = text[len(kept) :]
            if kept.strip():
                messages[-1] = {**messages[-1], "content": kept}
            else:
                # Nothing to go on with, and templates treat an empty turn in many ways: a turn begins.
                messages, continued, begun = messages[:-1], False, True
        how = {"continue_final_message": continued, "add_generation_prompt": begun and not continued}
        how |= self._variables(request)
        tools = () if request.tool_choice == "none" else request.tools
        try:
            rendered = self._render(messages, tools, how)
        except Exception as e:  # a template is a program of the model's makers, and may raise anything
            raise self._not_taken(e) from e
        return _Turns(rendered, messages, how, continued, blanks)

    def _not_taken(self, error: Exception) -> UserError:
        return UserError(f"The chat template of {self._name} does not take these messages: {_reason(error)}.")

    def _tokens(self, rendered: _Rendered, how: dict[str, Any]) -> list[int]:
        """Control tokens that the template writes, and none that somebody has typed in a message."""
        typed = (*rendered.messages, rendered.tools)
        if not any(map(self._format.has_typed, _texts(typed))):
            return self._tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
        tools = list(rendered.tools) or None
        return self._tokenizer.apply_chat_template(
            rendered.messages, tools=tools, return_dict=False, sanitize_control_tokens=True, **how
        )

    def _variables(self, request: GenerationRequest) -> dict[str, Any]:
        # What is no variable of the template's but an argument of the method would change how it is rendered.
        reserved = {*inspect.signature(self._tokenizer.apply_chat_template).parameters, "messages"}
        if taken := reserved & set(request.template):
            raise UserError(f"chat_template_kwargs: {min(taken)} cannot be set there. Leave it out.")
        return dict(request.template)

    def _render(
        self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], how: dict[str, Any]
    ) -> _Rendered:
        """The conversation; what the template refuses of tools, or passes over, is told as text."""

        def render(these: Sequence[dict[str, Any]], these_tools: Sequence[dict[str, Any]] = ()) -> _Rendered:
            text = self._tokenizer.apply_chat_template(
                list(these), tools=list(these_tools) or None, tokenize=False, **how
            )
            return _Rendered(text, list(these), tuple(these_tools))

        refused: Exception | None = None
        try:
            rendered = render(messages, tools)
            # A name may be there by chance.
            knows = not tools or (_names_tools(tools, rendered.text) and render(messages).text != rendered.text)
            if knows and _shows_tools(messages, rendered.text):
                return rendered
        except Exception as e:
            refused = e
        told = tools_as_text(messages)
        if not tools:
            if refused is not None and told == list(messages):
                raise refused
            return render(told)
        # Some templates know no system turn, or refuse it.
        for place in ("system", "user"):
            try:
                rendered = render(tell_tools(told, tools, place))
            except Exception as e:
                refused = e
                continue
            if _TELLS in rendered.text and _names_tools(tools, rendered.text):
                return replace(rendered, told=True)
        raise refused or UserError(f"The chat template of {self._name} shows no tools. Leave them out.")


@dataclass(frozen=True)
class _Rendered:
    """A conversation as text, of what it was made, and whether its tools are told within the messages."""

    text: str
    messages: list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...]
    told: bool = False


@dataclass(frozen=True)
class _Turns:
    """A conversation as text, its messages as they were rendered, and how; what `_conversation` says of the last turn."""

    rendered: _Rendered
    messages: list[dict[str, Any]]
    how: dict[str, Any]
    continued: bool
    blanks: str


def _names_tools(tools: Sequence[dict[str, Any]], rendered: str) -> bool:
    """Whether every tool is in the text."""
    return all(tool["function"]["name"] in rendered for tool in tools)


def _shows_tools(messages: Sequence[dict[str, Any]], rendered: str) -> bool:
    """Whether what tools said, and that they were called, is in the text: some templates pass over what they do not know."""
    needed = [message["content"].strip() for message in messages if message["role"] == "tool"]
    needed += [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]
    # Templates may show a text as JSON.
    return all(text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered for text in needed)


def tools_as_text(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation for a template that knows no tools: the assistant's calls and, from the user, their results.

    A result and what the user says beside it become one turn, since many templates want user and assistant in turn.
    """
    told: list[dict[str, Any]] = []
    of_tools = False  # whether the last turn told holds a result
    for message in messages:
        calls, role, content = message.get("tool_calls", ()), message["role"], message["content"]
        if calls:
            lines = [content] if content else []
            lines += [_CALL.format(json.dumps(call["function"], ensure_ascii=False)) for call in calls]
            message = {"role": role, "content": "\n".join(lines)}
        elif role == "tool":
            name = f" of {message['name']}" if message.get("name") else ""
            message = {"role": "user", "content": f"Result{name}:\n{content}"}
        if told and message["role"] == told[-1]["role"] == "user" and (of_tools or role == "tool"):
            told[-1] = {"role": "user", "content": f"{told[-1]['content']}\n\n{message['content']}"}
            of_tools = True
        else:
            told.append(message)
            of_tools = role == "tool"
    return told


def tell_tools(
    messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], place: str
) -> list[dict[str, Any]]:
    """The same conversation with the tools told in its system turn, or before what the user says first.

    Calls are asked for as Hermes and Qwen write them, which `petals_win.engines.formats.json_calls` reads.
    """
    listed = [json.dumps(tool["function"], ensure_ascii=False) for tool in tools]
    told = _TOOLS.format(call=_CALL.format('{"name": "NAME", "arguments": {...}}'), tools="\n".join(listed))
    messages = list(messages)
    at = next((number for number, message in enumerate(messages) if message["role"] == place), None)
    if at is None:
        return [{"role": place, "content": told}, *messages]
    known = messages[at]["content"]
    parts = [known, told] if place == "system" else [told, known]
    messages[at] = {**messages[at], "content": "\n\n".join(filter(None, parts))}
    return messages


def _texts(value: Any) -> Iterator[str]:
    """All texts in lists and dicts, but for keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _reason(error: Exception) -> str:
    """The first line of what a template says; with the kind of error, unless the template raised it on purpose."""
    from jinja2 import TemplateError

    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:_LONGEST_REASON]
    said = said.encode(errors="replace").decode()  # it may repeat what UTF-8 cannot carry
    return said if isinstance(error, TemplateError) else f"{said} ({type(error).__name__})"
