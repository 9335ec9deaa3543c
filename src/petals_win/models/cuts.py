"""Where a model may be cut: blocks that use what an earlier one made in the same pass stay on one PC with it.

Such are blocks without keys and values of their own, and those that attend to tokens that an earlier block has chosen. Knows
configurations. Does not know PCs.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from transformers import PreTrainedConfig

from petals_win.errors import UserError
from petals_win.models.architecture import num_blocks, text_config


def sources_of_keys(decoder_config: PreTrainedConfig) -> dict[int, int]:
    """By each block that has no keys and values of its own, the earlier one whose it attends to."""
    modes: list[str | None] = getattr(decoder_config, "kv_sharing_modes", None) or []
    kinds: list[str] = decoder_config.layer_types or [] if modes else []
    sources: dict[int, int] = {}
    latest: dict[str, int] = {}
    for block, (mode, kind) in enumerate(zip(modes, kinds, strict=True)):
        if mode == "store":
            latest[kind] = block
        elif mode == "reuse":
            sources[block] = latest[kind]
    return sources


def sources_of_choices(decoder_config: PreTrainedConfig) -> dict[int, int]:
    """By each block that attends to tokens that an earlier one has chosen, that one."""
    sources: dict[int, int] = {}
    chooses = 0
    for block, mode in enumerate(getattr(decoder_config, "indexer_types", None) or []):
        if mode == "shared":
            sources[block] = chooses
        else:
            chooses = block
    return sources


@dataclass(frozen=True)
class Cuts:
    """The numbers of those blocks before which a model may be cut, its two ends included, in order."""

    places: tuple[int, ...]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Cuts:
        """Of a model with this configuration."""
        decoder_config = text_config(config)
        bound: set[int] = set()
        for sources in (sources_of_keys(decoder_config), sources_of_choices(decoder_config)):
            for block, source in sources.items():
                bound.update(range(source + 1, block + 1))
        return cls(tuple(place for place in range(num_blocks(decoder_config) + 1) if place not in bound))

    @property
    def num_blocks(self) -> int:
        return self.places[-1]

    @property
    def anywhere(self) -> bool:
        """Whether each block may be on a PC of its own."""
        return len(self.places) > self.num_blocks

    def allow(self, start: int, end: int) -> bool:
        """Whether the blocks [start, end) need no others."""
        return self.anywhere or (start in self.places and end in self.places)

    def why_not(self, start: int, end: int) -> str:
        """What to tell whoever asks for blocks that need others, and what would do."""
        place = start if start not in self.places else end
        first, last = self.before(place), self.after(place)
        before = f"up to {first}, or " if first > 0 else ""
        return (
            f"The blocks {start}:{end} of this model need others: {first}:{last} use the keys, or the choices, of one another, so that no "
            f"cut may part them. Serve blocks {before}with all of {first}:{last}."
        )

    def check(self, start: int, end: int) -> None:
        """Raise a UserError for blocks that cannot be served without others."""
        if not self.allow(start, end):
            raise UserError(self.why_not(start, end))

    def before(self, block: int) -> int:
        """The last place up to there."""
        return self.places[bisect_right(self.places, block) - 1]

    def after(self, block: int) -> int:
        """The first place from there on."""
        return self.places[min(bisect_left(self.places, block), len(self.places) - 1)]

    def run_from(self, start: int, most: int) -> int:
        """Where a run ends that begins at a place and has as many blocks, up to `most`, as may be; `start` if there is none."""
        return max(start, self.before(min(start + most, self.num_blocks)))

    @property
    def halves(self) -> list[tuple[int, int]]:
        """Two runs of about as many blocks; one, if there is no place to cut at."""
        half = self.num_blocks // 2
        middle = min(self.places[1:-1], key=lambda place: abs(place - half), default=self.num_blocks)
        return [run for run in ((0, middle), (middle, self.num_blocks)) if run[0] < run[1]]

    @property
    def fewest_together(self) -> int:
        """How many blocks the smallest run has that cannot be cut."""
        return min(end - start for start, end in zip(self.places, self.places[1:], strict=False))
