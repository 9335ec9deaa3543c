"""Trying out, on a loaded decoder, whether a joint pass computes what each session computes alone.

Decided by numbers, since no configuration tells in which way a model's attention can be shared. Knows blocks and caches. Does not know
how a joint pass works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from petals_win.span.cache import KvShape, SessionCache
from petals_win.span.decoder import CutDecoder

# Sessions of a trial: rows, and tokens that they have seen. The last one is as long as a window, if the block has one.
_ROWS = (1, 1, 2)
_PASTS = (5, 0, 40)
_LONGEST = 8192
_NEW_TOKENS = ((1, 1, 1), (1, 3, 4))  # of each session, in a pass of decodes, and in one with prefills
_LONG = (1, 3, 20)  # where a long pass goes another way

# How far a token may be off, as a part of what another past would change. Rounding in 16 bits may lead single tokens to other experts.
_EXACT, _ROUNDED = 1e-3, 0.1
_TOKENS_OF_ROUNDED = 0.75

Parts = Sequence[tuple[SessionCache, torch.Tensor]]


def agrees(
    decoder: CutDecoder,
    shapes: Sequence[KvShape],
    together: Callable[[Parts, int, int], list[torch.Tensor]],
    device: torch.device,
    exact: bool,
    long: bool = False,
) -> bool:
    """Whether `together` computes on one block of each kind what `decoder.run` does for each session alone.

    `together` takes the caches and hidden states [rows, tokens, hidden] of sessions, and a range of blocks. `exact`: the
    blocks compute in 32 bits. `long`: try a pass of many tokens, too. Raises whatever the model does.
    """
    new_tokens = (*_NEW_TOKENS, _LONG) if long else _NEW_TOKENS
    # A length beyond all of the trial, so that the texts compared have one rotary table.
    with decoder.declared(2 * _LONGEST):
        return all(
            _agrees_in(decoder, part, shapes[part.start : part.stop], together, device, exact, new_tokens)
            for part in parts_of_each_kind(decoder, shapes)
        )


def parts_of_each_kind(decoder: CutDecoder, shapes: Sequence[KvShape]) -> list[range]:
    """Counted from the decoder's first block: one block of each kind, and those that can only be run together."""
    places = [place - decoder.start for place in decoder.cuts.places if decoder.start <= place <= decoder.end]
    parts = {
        "".join(_kind(decoder.layers[index], shapes[index]) for index in range(start, end)): range(start, end)
        for start, end in zip(places, places[1:], strict=False)
    }
    return list(parts.values())


def _agrees_in(
    decoder: CutDecoder,
    part: range,
    shapes: Sequence[KvShape],
    together: Callable[[Parts, int, int], list[torch.Tensor]],
    device: torch.device,
    exact: bool,
    new_tokens: Sequence[Sequence[int]],
) -> bool:
    start, end = decoder.start + part.start, decoder.start + part.stop
    chance = torch.Generator().manual_seed(0)
    room = max(max(each) for each in new_tokens)
    window = max(shape.window or 0 for shape in shapes)
    pasts = [min(past, _LONGEST) for past in (*_PASTS[:-1], window + _PASTS[-1])]

    def caches() -> list[SessionCache]:
        made = []
        for rows, past in zip(_ROWS, pasts, strict=True):
            cache = SessionCache(shapes, start, rows, past + room, device)
            cache.fill(past, chance)
            made.append(cache)
        return made

    def alone(parts: Parts) -> list[torch.Tensor]:
        return [decoder.run(hidden.to(device), start, end, cache).cpu() for cache, hidden in parts]

    ours, others = caches(), caches()
    right: list[torch.Tensor] = []
    try:
        for tokens in new_tokens:
            # Small, so that what the block adds to its input is most of the output.
            hidden = [
                (0.1 * torch.randn(rows, new, decoder.row.width, generator=chance)).to(shapes[0].dtype)
                for rows, new in zip(_ROWS, tokens, strict=True)
            ]
            parts = list(zip(ours, hidden, strict=True))
            expected, other = alone(parts), alone(list(zip(others, hidden, strict=True)))
            matters = max(_distance(*pair).max() for pair in zip(other, expected, strict=True))
            for want, got in zip(expected, together(parts, start, end), strict=True):
                right.append((_distance(got, want) <= (_EXACT if exact else _ROUNDED) * matters).flatten())
    finally:
        for cache in [*ours, *others]:
            cache.free()
    return bool(torch.cat(right).float().mean() >= (1.0 if exact else _TOKENS_OF_ROUNDED))


def continues(decoder: CutDecoder, shapes: Sequence[KvShape], device: torch.device) -> bool:
    """Whether blocks with recurrent states compute several tokens after others as they would compute all of them at once."""
    kinds = {
        _kind(layer, shape): index
        for index, (layer, shape) in enumerate(zip(decoder.layers, shapes, strict=True))
        if shape.states
    }
    return all(_continues_in(decoder, index, shapes[index], device) for index in kinds.values())


def _continues_in(decoder: CutDecoder, index: int, shape: KvShape, device: torch.device) -> bool:
    number, first, more = decoder.start + index, 5, 6
    chance = torch.Generator().manual_seed(0)
    hidden = 0.1 * torch.randn(1, first + more, decoder.row.width, generator=chance)
    hidden = hidden.to(device, shape.dtype)
    cache = SessionCache([shape], number, 1, first + more, device)
    try:
        whole = decoder.run(hidden, number, number + 1, cache)[:, first:]
        decoder.run(hidden[:, :first], number, number + 1, cache)
        cache.position = first
        after = decoder.run(hidden[:, first:], number, number + 1, cache)
        cache.position = 0
        without = decoder.run(hidden[:, first:], number, number + 1, cache)
    finally:
        cache.free()
    most = _EXACT if shape.dtype is torch.float32 else _ROUNDED
    return bool(_distance(after, whole).max() <= most * _distance(without, whole).max())


def _distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of each token, [rows, tokens]."""
    return (one.float() - other.float()).norm(dim=-1)


def _kind(layer: nn.Module, shape: KvShape) -> str:
    """Equal for blocks that compute alike."""
    parts = []
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and key != "layer_idx"
        }
        parts.append((name, type(module), sorted(settings.items())))
    return repr((shape, parts))
