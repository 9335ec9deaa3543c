"""Petals' documented inference session, for programs without an event loop: each call waits for the remote session.

Knows RemoteSession. Does not know nodes. petals.client.inference_session hands it on.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from typing import Any

import torch

from petals_win.client.session import RemoteSession, SwarmBlocks
from petals_win.host.futures import AwaitableFuture

logger = logging.getLogger(__name__)


class SessionCancelled(Exception):
    """The session was given up by `cancel` while a step was in work."""


class InferenceSession:
    """A session of at most `max_length` tokens on the nodes that `sequence_manager` finds; a context that closes it."""

    def __init__(self, sequence_manager: Any, max_length: int):
        self.remote: RemoteSession = SwarmBlocks(sequence_manager).open(max_length)
        self.num_blocks = len(sequence_manager)
        self.output_ids: torch.Tensor | None = None  # what generate() has made, as it goes on in the same session
        self._closed = False
        self._cancelled = threading.Event()
        self._answer: AwaitableFuture[torch.Tensor] | None = None

    @property
    def position(self) -> int:
        """How many tokens the session has seen."""
        return self.remote.position

    @property
    def last_token_id(self) -> torch.Tensor | None:
        """[batch, 1]: the last of `output_ids`, as programs for Petals before 2.1 ask for it."""
        return None if self.output_ids is None else self.output_ids[:, -1:]

    @last_token_id.setter
    def last_token_id(self, value: torch.Tensor) -> None:
        if self.output_ids is None:
            raise RuntimeError("The session has no tokens yet")
        self.output_ids[:, -1:] = value

    def step(
        self, inputs: torch.Tensor, prompts: torch.Tensor | None = None, hypo_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As RemoteSession.step, where empty tensors mean none. Raises SessionCancelled after `cancel`."""
        if self._closed:
            raise RuntimeError("The session is closed")
        if self._cancelled.is_set():
            raise SessionCancelled("The session was given up")
        if torch.is_grad_enabled():
            logger.warning("Gradients do not flow through an inference session: call it under torch.no_grad()")
        self._answer = self.remote.submit(inputs, prompts=_unless_empty(prompts), hypo_ids=_unless_empty(hypo_ids))
        if self._cancelled.is_set():  # by whoever did not see this answer yet
            self._answer.cancel()
        try:
            return self._answer.result()
        except concurrent.futures.CancelledError:
            raise SessionCancelled("The session was given up") from None
        finally:
            self._answer.cancel()  # where Ctrl+C ended the wait

    def cancel(self) -> None:
        """Give the session up, from any thread: a step in work, or waiting for room, raises SessionCancelled at once."""
        self._cancelled.set()
        if (answer := self._answer) is not None:
            answer.cancel()

    def close(self, *_exception: Any) -> None:
        """Give back what the nodes hold. Takes at most 3 s. Closing twice is allowed."""
        if not self._closed:
            self._closed = True
            self.remote.submit_close().result()

    def __enter__(self) -> InferenceSession:
        if self._closed:
            raise RuntimeError("The session is closed")
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close(*exception)


def _unless_empty(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None or tensor.numel() == 0 else tensor
