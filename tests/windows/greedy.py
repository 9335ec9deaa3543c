"""One greedy text of the default model, the same on every system, and clients that generate it."""

from __future__ import annotations

from typing import Any

import torch

from petals_win.models.source import DEFAULT_MODEL, open_model

PROMPT = "My favourite animal is"
TOKENS = 32
TEXT = (
    "My favourite animal is a cat. What's your favourite animal?\n\nI'm not sure if I'm being too harsh, but I'm not sure "
    "if I'm being too"
)


class Client:
    """A client of a swarm that serves the default model. Close it."""

    def __init__(self, peers: list[str]):
        from petals import AutoDistributedModelForCausalLM

        self._model: Any = AutoDistributedModelForCausalLM.from_pretrained(
            DEFAULT_MODEL, initial_peers=peers, show_route=False
        ).eval()

    def text(self, on_token=None) -> str:
        """PROMPT and TOKENS tokens more; `on_token` is called with the number of those that are there."""
        return generate(self._model, on_token)

    def close(self) -> None:
        self._model.blocks.sequence_manager.shutdown()
        self._model.blocks.sequence_manager.dht.shutdown()


def text_by_transformers() -> str:
    """The same by transformers alone, in this process."""
    return generate(open_model(DEFAULT_MODEL).whole_model())


@torch.inference_mode()
def generate(model: Any, on_token=None) -> str:
    from transformers.generation.streamers import BaseStreamer

    class Counter(BaseStreamer):
        count = -1  # the prompt comes first

        def put(self, value) -> None:
            self.count += 1
            if on_token is not None:
                on_token(self.count)

        def end(self) -> None:
            pass

    tokenizer: Any = open_model(DEFAULT_MODEL).tokenizer()
    prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens = model.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, streamer=Counter())
    return tokenizer.decode(tokens[0])
