"""The arguments of a program that is started for one question: placeholders, and what a prompt could do in their place.

Knows command lines. Does not know processes, nor how a prompt is made.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from petals_win.engines.command_messages import Sampling
from petals_win.errors import UserError
from petals_win.host.programs import LONGEST_ARGUMENT, argument_length

_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
# With what an option begins.
_OPENERS = ("-", "/") if sys.platform == "win32" else ("-",)
# These start a shell, which reads a quote or an ampersand of a prompt as its own.
_SHELL_FILES = (".bat", ".cmd")

Option = Literal["max_tokens", "temperature", Sampling]


def takes_prompt(arguments: Iterable[str]) -> bool:
    """Whether the prompt is an argument; otherwise it comes by standard input."""
    return any("prompt" in _PLACE.findall(argument) for argument in arguments)


def check_program(program: str, arguments: Iterable[str]) -> None:
    """Raises ValueError for a program that must not have a prompt among its arguments."""
    # Windows takes "x.cmd." for x.cmd.
    if takes_prompt(arguments) and program.rstrip(" .").lower().endswith(_SHELL_FILES):
        raise ValueError("a batch file may read a prompt as commands. Let it take the prompt by its standard input")


def check_placeholders(
    program: str, arguments: Iterable[str], options: Mapping[Any, Iterable[str]], settings: Collection[str]
) -> None:
    """Raises ValueError for what could not be filled in. settings: what every model says of itself."""
    arguments = list(arguments)
    known = {"prompt", "model", *settings}
    places = [(argument, known) for argument in arguments]
    places += [(argument, {name}) for name, adds in options.items() for argument in adds]
    for argument, names in places:
        if unknown := set(_PLACE.findall(argument)) - names:
            raise ValueError(f"nothing can be put in the place of {{{min(unknown)}}} in {argument!r}")
    check_program(program, arguments)


def filled(
    arguments: Iterable[str],
    adds: Mapping[Any, Iterable[str]],
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    prompt: str,
) -> list[str]:
    """The arguments of one run: those of all runs, then those of each option that is asked for.

    Raises UserError for a prompt that could be taken for an option, or is too long.
    """
    made = [_fill(argument, {**settings, "prompt": prompt}) for argument in arguments]
    if any(argument.startswith("{prompt}") for argument in arguments) and prompt.startswith(_OPENERS):
        raise UserError(f"The program that answers could take a prompt that begins with {prompt[0]!r} for an option.")
    if takes_prompt(arguments):
        if "\0" in prompt:
            raise UserError("The program that answers takes no prompt with a zero character.")
        if (length := argument_length(prompt)) > LONGEST_ARGUMENT:
            raise UserError(
                f"The program that answers takes prompts of at most {LONGEST_ARGUMENT} bytes, and this one takes {length}."
            )
    for name, value in options.items():
        made += [_fill(argument, {name: value}) for argument in adds[name]]
    return made


def _fill(argument: str, values: Mapping[str, Any]) -> str:
    """In one pass: what looks like a placeholder in a prompt stays what it is."""
    return _PLACE.sub(lambda found: str(values[found[1]]), argument)
