"""What passes from one block to the next for each token: a row of numbers, which for some models is more than one hidden state.

Some blocks compute several streams side by side, and some get inputs of their own that are made of the token's id. Both stand in the row, so
that whoever passes rows on, keeps or repeats them need not know. Knows configurations. Does not know blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from petals_win.models.architecture import num_blocks


@dataclass(frozen=True)
class Row:
    """`streams` hidden states one after the other, then `own` numbers for each of the model's `blocks`."""

    hidden: int
    streams: int = 1
    own: int = 0
    blocks: int = 0

    @classmethod
    def of(cls, decoder_config: PreTrainedConfig) -> Row:
        """Of a decoder with this configuration."""
        own = getattr(decoder_config, "hidden_size_per_layer_input", None) or 0
        streams = getattr(decoder_config, "altup_num_inputs", None) or 1
        blocks = num_blocks(decoder_config) if own else 0
        return cls(decoder_config.hidden_size, streams, own, blocks)

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return self._of_streams + self.own * self.blocks

    @property
    def is_hidden_state(self) -> bool:
        """Whether a row is one hidden state and nothing else."""
        return self.width == self.hidden

    @property
    def _of_streams(self) -> int:
        return self.hidden * self.streams

    def __str__(self) -> str:
        """As part of a sentence about its width."""
        if self.is_hidden_state:
            return str(self.width)
        own = f", and {self.own} for each of {self.blocks} blocks" if self.own else ""
        return f"{self.width} ({self.streams} x {self.hidden}{own})"

    def pack(self, hidden: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
        """Rows [batch, tokens, width] of what blocks take and return, as `hidden_of` tells, and of [batch, tokens, blocks x own]."""
        if self.streams > 1:
            hidden = hidden.permute(1, 2, 0, 3).flatten(2)
        return hidden if own is None else torch.cat([hidden, own], dim=-1)

    def hidden_of(self, rows: torch.Tensor) -> torch.Tensor:
        """What a block takes of rows [batch, tokens, width]: [batch, tokens, hidden], or [streams, batch, tokens, hidden]."""
        if self.is_hidden_state:
            return rows
        hidden = rows[..., : self._of_streams]
        return hidden if self.streams == 1 else hidden.unflatten(-1, (self.streams, self.hidden)).permute(2, 0, 1, 3)

    def all_own(self, rows: torch.Tensor) -> torch.Tensor | None:
        """[batch, tokens, blocks x own] of rows [batch, tokens, width]; None if blocks get nothing of their own."""
        return rows[..., self._of_streams :] if self.own else None

    def own_of(self, rows: torch.Tensor, start: int, end: int) -> torch.Tensor | None:
        """[batch, tokens, end - start, own] for the blocks [start, end); None as above."""
        own = self.all_own(rows)
        return None if own is None else own.unflatten(-1, (self.blocks, self.own))[..., start:end, :]
