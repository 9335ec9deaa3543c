"""Gemma 3n and Gemma 4: blocks that get more than a hidden state, and take keys and values of others, in spans, sessions and passes."""

from __future__ import annotations

import asyncio

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from petals_win.client.ends import Ends
from petals_win.client.hollow import hollow_model
from petals_win.errors import NodeRefused, UserError
from petals_win.models.source import open_model
from petals_win.node.budget import CacheBudget
from petals_win.node.container import default_length
from petals_win.node.service import BlockService
from petals_win.span.needs import needs_of
from petals_win.span.prefixes import PAGE_TOKENS
from petals_win.span.span import Span
from span.equal_logits import Served, cut_of, whole_model
from span.families import COMMON, FAMILIES, VOCABULARY, config_of

WIDE = ["gemma3n_text", "gemma4_text"]
TEXT = torch.randint(3, VOCABULARY, (100,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=WIDE)
def folder(request, checkpoint):
    return checkpoint(request.param)


@pytest.fixture
def whole(folder) -> Span:
    return Span.load(open_model(str(folder)), 0, 8)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def rows(span: Span, batch: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, tokens, span.row.width, generator=torch.Generator().manual_seed(seed))


def test_blocks_that_belong_together_are_loaded_together_or_not_at_all(folder):
    source = open_model(str(folder))
    for start, end in ((0, 5), (3, 8), (7, 8)):
        with pytest.raises(UserError, match="Serve blocks up to 2, or with all of 2:8"):
            Span.load(source, start, end)


def test_a_client_that_parts_them_is_refused(whole, compute):
    service = BlockService(whole, compute, CacheBudget(8 * 2**20), context_length=512, request_tokens=64)
    states = rows(whole, 1, 3)
    with pytest.raises(NodeRefused, match="no cut may part them"):
        service.open(0, 5, batch_size=1, max_length=20)
    with pytest.raises(NodeRefused, match="no cut may part them"):
        asyncio.run(service.forward(states, 4, 8))
    with pytest.raises(NodeRefused, match=r"\[batch, tokens, .* for each of 8 blocks\)\], got \(1, 3, 64\)"):
        asyncio.run(service.forward(states[..., :64], 0, 8))
    with pytest.raises(NodeRefused, match="take no deep prompts"):
        asyncio.run(service.forward(states, 0, 2, prompts=torch.zeros(2, 1, 1, 64)))
    session = service.open(0, 2, batch_size=1, max_length=20)
    with pytest.raises(NodeRefused, match=r"must be \[1, tokens, .* not \[1, 1, 64\]"):
        session.check_step((1, 1, 64))


def test_they_share_passes(whole):
    assert whole._joint.works


def test_passes_without_a_session_go_in_pieces_that_stay_together(whole, compute):
    service = BlockService(whole, compute, CacheBudget(8 * 2**20), context_length=512, request_tokens=64)
    states, grads = rows(whole, 2, 11), rows(whole, 2, 11, seed=1)

    async def ask():
        return await service.forward(states, 0, 8), await service.backward(states, grads, 0, 8)

    output, (grad,) = asyncio.run(ask())
    expected = whole.forward(states, 0, 8)
    close(output, expected)
    assert not torch.equal(grad, grads)
    wanted, _ = whole.backward(states, grads, 0, 8)
    close(grad, wanted)
    # What blocks get for themselves is the same for all of them, and its gradient the sum of what goes on and what each has.
    halfway = whole.forward(states, 0, 2)
    later, _ = whole.backward(halfway, grads, 2, 8)
    close(whole.backward(states, later, 0, 2)[0], wanted)
    own = whole.row.all_own(output)
    assert own is not None and torch.equal(own, whole.row.all_own(states))


def test_what_a_session_has_left_is_gone_on_from(folder, whole):
    states, pages = rows(whole, 1, 90), PAGE_TOKENS
    expected = whole.forward(states, 0, 8)
    session = whole.open(1, 100)
    whole.step(session, states[:, :70])
    assert session.open_cache.nbytes <= whole.session_bytes(1, 100)
    state = session.leave(pages)
    assert state is not None and state.position == pages
    again = whole.open(1, 100, past=(state, pages))
    close(whole.step(again, states[:, pages:85]), expected[:, pages:85])
    close(whole.step(again, states[:, 80:], start=80), expected[:, 80:])


def test_blocks_without_keys_of_their_own_take_no_memory_for_them(whole):
    kept = [shape.bytes_per_token for shape in whole._shapes]
    assert all(kept[:5]) and not any(kept[5:])


@pytest.mark.parametrize(("family", "places"), [("gemma3n_text", (0, 1, 2, 8)), ("gemma4-experts", (0, 1, 2, 3, 4))])
def test_what_a_plan_needs_to_know(family, places):
    """Also of models whose blocks differ in their heads."""
    needed = needs_of(config_of(family), torch.bfloat16)
    assert needed.cuts.places == places and needed.cache_tokens == 16384, "heads share keys"
    assert default_length(config_of(family)) == 8192


@pytest.mark.parametrize("quant", ["int4"])
def test_quantized(folder, whole, quant):
    span = Span.load(open_model(str(folder)), 2, 8, quant=quant)
    states = whole.forward(rows(whole, 1, 9), 0, 2)
    exact = whole.row.hidden_of(whole.forward(states, 2, 8))
    found = whole.row.hidden_of(span.forward(states, 2, 8))
    assert span.weight_bytes < whole.weight_bytes
    assert (found - exact).norm() < 0.5 * exact.norm()


def test_gemma_3n_as_it_is_published(checkpoint, tmp_path):
    """Its text lies among eyes, whose package is not needed, and ears; ids of what they see and hear are embedded by themselves."""
    text = checkpoint("gemma3n_text")
    parts = {"hidden_size": 12, "vocab_size": 6, "rms_norm_eps": 1e-6}
    config = AutoConfig.for_model(
        "gemma3n",
        text_config={**COMMON, **FAMILIES["gemma3n_text"][1]},
        vision_config={**parts, "vocab_offset": VOCABULARY - 12, "label_names": ["a"]},
        audio_config={
            **parts,
            "vocab_offset": VOCABULARY - 6,
            "conf_num_hidden_layers": 1,
            "conf_num_attention_heads": 2,
        },
    )
    config.save_pretrained(tmp_path)
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(text / "model.safetensors").items()
    }
    for name in ("embed_vision", "embed_audio"):
        norms = {f"model.{name}.{each}_embedding_norm.weight": torch.ones(12) for each in ("hard", "soft")}
        tensors |= norms
        tensors[f"model.{name}.embedding.weight"] = torch.randn(6, 12)
        tensors[f"model.{name}.embedding_projection.weight"] = torch.randn(64, 12)
    tensors["model.vision_tower.timm_model.conv_stem.conv.weight"] = torch.ones(4, 3, 3, 3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = open_model(str(tmp_path))
    served = Served(source)
    ids = TEXT[:40] % (VOCABULARY - 12)
    with torch.inference_mode():
        expected = whole_model(text)(input_ids=ids[None], use_cache=False).logits[0]
    assert (served.step(served.open(40), ids) - expected).abs().max() <= 1e-4
    assert cut_of(source.config) == [(0, 1), (1, 2), (2, 8)]


def test_the_ends_embed_all_rows_in_one_pass(folder):
    ends = Ends(hollow_model(open_model(str(folder)), torch.nn.Identity()))
    assert ends.batched
    hidden = ends.embed(TEXT[:4], torch.tensor([0, 7, 3, 50]))
    close(hidden[1:2], ends.embed(TEXT[1:2], torch.tensor([7])))
