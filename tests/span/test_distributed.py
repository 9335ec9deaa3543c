"""The model that a client of Petals gets, of every kind of class, with spans of this process where the swarm would be."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from petals import models
from petals.utils.auto_config import AutoDistributedConfig
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from petals_win.client import hollow
from petals_win.errors import UserError
from petals_win.models.source import open_model
from petals_win.span import speed
from petals_win.span.span import Span
from span.equal_logits import cut_of, whole_model
from span.families import VOCABULARY

SPECIAL = [
    "gemma3n_text",
    "gemma4",
    "glm_moe_dsa",
    "longcat_flash",
]  # what passes between blocks, or what they keep, is
IDS = torch.randint(3, VOCABULARY, (1, 13), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def plain_linears(monkeypatch):
    """Without the packed weights, whose sums differ in the last bit, the model is to be exact."""
    monkeypatch.setattr("petals_win.span.filling.lay_out_linears", lambda modules: 0)
    monkeypatch.setattr(hollow, "fast_head", lambda head, *_: head)


class Streamer(BaseStreamer):
    """Takes tokens as they come, as the API does."""

    def put(self, value):
        """Nothing is done with it."""

    def end(self):
        """Nor here."""


class Session:
    output_ids = None

    def __init__(self, spans: list[Span], max_length: int) -> None:
        self._steps = [(span, span.open(1, max_length)) for span in spans]

    @property
    def position(self) -> int:
        return self._steps[0][1].position

    def step(self, hidden, prompts=None, hypo_ids=None):
        for span, session in self._steps:
            own = None if prompts is None else list(prompts[span.start : span.end])
            hidden = span.step(session, hidden, prompts=own, hypo_ids=hypo_ids)
        return hidden


class Blocks(torch.nn.Module):
    """As much of RemoteSequential as a model looks at."""

    def __init__(self, source) -> None:
        super().__init__()
        self.spans = [Span.load(source, *cut) for cut in cut_of(source.config)]
        self.active_session: Session | None = None

    @property
    def position(self) -> int:
        return self.active_session.position if self.active_session else 0

    @contextlib.contextmanager
    def inference_session(self, *, max_length: int):
        self.active_session = Session(self.spans, max_length)
        try:
            yield self.active_session
        finally:
            self.active_session = None

    def use_session(self, session: Session):
        return contextlib.nullcontext(session)

    def forward(self, hidden, prompts=None, hypo_ids=None):
        if self.active_session is not None:
            return self.active_session.step(hidden, prompts, hypo_ids)
        for span in self.spans:
            own = None if prompts is None else list(prompts[span.start : span.end])
            hidden = span.forward(hidden, span.start, span.end, prompts=own)
        return hidden


@pytest.fixture
def distributed(monkeypatch):
    def make(folder, **fields):
        source = open_model(str(folder))
        monkeypatch.setattr(models, "RemoteSequential", lambda config, dht=None: Blocks(source))
        return models.distribute(source, AutoDistributedConfig.of(source, **fields))

    return make


@pytest.mark.parametrize("family", ["llama", "gemma3", "mpt", "bloom", "codegen", "falcon-alibi", "gpt2", *SPECIAL])
def test_generate(checkpoint, distributed, family):
    folder = checkpoint(family)
    whole = whole_model(folder)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = whole.generate(IDS, use_cache=True, attention_mask=torch.ones_like(IDS), **settings)
    assert torch.equal(distributed(folder).generate(IDS, **settings), expected)


def test_generate_where_the_model_was_saved_without_a_cache(checkpoint, distributed):
    """As many are that were tuned: transformers then computes all tokens anew at each step, which no node has to."""
    folder = checkpoint("llama", use_cache=False)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = AutoModelForCausalLM.from_pretrained(checkpoint("llama")).generate(IDS, **settings)
    assert torch.equal(distributed(folder).generate(IDS, **settings), expected)


@pytest.mark.parametrize("mode", ["ptune", "deep_ptune"])
def test_prompt_tuning_of_the_text_among_images(checkpoint, distributed, mode):
    model = distributed(checkpoint("gemma3"), tuning_mode=mode, pre_seq_len=3)
    with torch.no_grad():
        outputs = model(IDS, labels=IDS)
    assert outputs.logits.shape == (1, 13, VOCABULARY) and torch.isfinite(outputs.loss)


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4"])
def test_what_is_made_of_token_ids_cannot_be_made_of_embeddings(checkpoint, distributed, family):
    model = distributed(checkpoint(family))
    with pytest.raises(ValueError, match=f"type {family} .* Send input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(IDS))
    with pytest.raises(UserError, match="prompt tuning cannot be used"):
        distributed(checkpoint(family), tuning_mode="ptune", pre_seq_len=3)


def test_a_block_that_attends_twice_is_one_block(checkpoint):
    source = open_model(str(checkpoint("longcat_flash")))
    assert AutoDistributedConfig.of(source).num_hidden_layers == source.num_blocks == 4


def test_the_speed_of_text_among_images(checkpoint, home, monkeypatch):
    monkeypatch.setattr(speed, "_SECONDS", 0.01)
    source = open_model(str(checkpoint("gemma3")))
    span = Span.load(source, 0, 2)
    measured = speed.measure_speed(span)
    announced = speed.known_speed(AutoDistributedConfig.of(source), span.device, span.dtype, "none")
    assert announced == measured, "found again by the configuration that the node knows before it loads"


def test_beams_that_the_model_s_makers_ask_for(checkpoint, distributed, tmp_path, caplog):
    folder = Path(shutil.copytree(checkpoint("llama"), tmp_path / "llama"))
    asked = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **asked}))
    with caplog.at_level(logging.WARNING, logger="petals_win"):
        model = distributed(folder)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("petals_win")]
    assert said == [
        "The generation_config.json of llama asks for num_beams 4, num_return_sequences 2, which is ignored"
    ]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = AutoModelForCausalLM.from_pretrained(checkpoint("llama")).generate(IDS, **settings)
    with model.inference_session(max_length=32) as session:
        made = model.generate(IDS, session=session, streamer=Streamer(), **settings)
    assert torch.equal(made, expected)
