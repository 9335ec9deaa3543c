"""The option --model where it may be given several times, and what it is for: one engine over all that it names. Knows names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from petals_win.engines.keep_alive import seconds_of
from petals_win.engines.registry import AUTO, EngineSettings, check_engine_name, engine_names, find_engine
from petals_win.errors import UserError

if TYPE_CHECKING:  # torch takes seconds to import: not before the arguments are checked
    from petals_win.engines.base import Engine

KeepAlive = Annotated[
    str | None,
    typer.Option(
        help="How long an idle model stays in memory: 5m, 90s, 0 (at once) or -1 (for ever); default: 5m with several models, and "
        "for ever with one. For models of the engines 'local' and 'onnx'."
    ),
]

# What of the settings an engine of ours can do something with, where they are not for it alone.
_OF_USE = {
    "command": (),
    "local": ("device", "dtype", "quant"),
    "onnx": (),
    "openai": ("base_url", "upstream_key"),
    "petals": ("peers",),
}
_OPTIONS = {"peers": "--peers", "device": "--device", "dtype": "--dtype", "quant": "--quant", "base_url": "--base-url"}


def named_models(models: Sequence[str], engine: str) -> list[tuple[str, str]]:
    """The engine and the model of each ENGINE:MODEL; what has no engine of its own gets `engine`.

    Raises UserError if there is no such engine.
    """
    check_engine_name(engine)
    known = engine_names()
    parts = [text.partition(":") for text in models]
    return [
        (name, model) if colon and name in known else (engine, name + colon + model) for name, colon, model in parts
    ]


def open_models(
    named: Sequence[tuple[str, str]], common: EngineSettings, keep_alive: str | None, tell: Callable[[str], None]
) -> Engine:
    """One engine over all models. `tell` gets lines for the user. Blocks until what is to be there from the beginning is loaded.

    One model is loaded at once, several when somebody asks for them. Raises UserError, also for options that are of no use.
    """
    from petals_win.engines.choosing import choose_engine
    from petals_win.engines.offers import Offer, can_unload, look
    from petals_win.engines.several import KEEP_ALIVE_S, SeveralEngines

    alone = len(named) == 1
    keep_s = seconds_of(keep_alive) if keep_alive is not None else math.inf if alone else KEEP_ALIVE_S
    wanted: list[tuple[str, EngineSettings]] = []
    for name, model in named:
        settings = replace(common, model=model)
        choice = choose_engine(name, settings)
        if name == AUTO:
            tell(f"Engine: {choice.name}, {choice.why}." if alone else f"{model}: {choice.name}, {choice.why}.")
        wanted.append((choice.name, settings if alone else _of_use(choice.name, settings)))
    if keep_alive is not None and not any(can_unload(name) for name, _ in wanted):
        raise UserError(
            "--keep-alive is for models of the engines 'local' and 'onnx'; others are not unloaded. Leave it out."
        )
    _check_all_of_use(common, [name for name, _ in wanted])
    engines: dict[int, Engine] = {}
    offers: dict[int, Offer] = {}
    # Those that stay come first, since the others are to fit beside them.
    for number, (name, settings) in sorted(enumerate(wanted), key=lambda each: can_unload(each[1][0])):
        unloads = can_unload(name) and not (alone and keep_alive is None)
        open_engine = partial(find_engine(name), settings)
        if unloads:
            offers[number] = look(name, settings)
        if alone or not unloads:
            engines[number] = open_engine()
        if not unloads:
            offers[number] = Offer(name, tuple(engines[number].models()), open_engine)
    _check_names([card.id for number in sorted(offers) for card in offers[number].cards])
    numbers = range(len(wanted))
    return SeveralEngines([offers[number] for number in numbers], keep_s, [engines.get(number) for number in numbers])


def _of_use(engine: str, settings: EngineSettings) -> EngineSettings:
    """Those of the settings that the engine can do something with; one of another package gets all."""
    if engine not in _OF_USE:
        return settings
    kept = {name: getattr(settings, name) for name in _OF_USE[engine]}
    return EngineSettings(settings.model, token=settings.token, **kept)


def _check_all_of_use(common: EngineSettings, engines: Sequence[str]) -> None:
    """Raises UserError for an option that no engine can do anything with. One alone says so itself, in its own words."""
    if len(engines) == 1 or not all(engine in _OF_USE for engine in engines):
        return
    used = {name for engine in engines for name in _OF_USE[engine]}
    for name, option in _OPTIONS.items():
        if getattr(common, name) and name not in used:
            raise UserError(
                f"{option} is of no use to any of the engines {', '.join(sorted(set(engines)))}. Leave it out."
            )


def _check_names(names: Sequence[str]) -> None:
    """Raises UserError if two models have one name."""
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"Two of the models have the name {name}, by which they are asked for. Leave one out, or give it another: that of its folder "
                "or file, or of a model made by 'petals-win convert' the \"name\" in petals_win_conversion.json."
            )
