"""The two-node swarm computes what transformers computes in one process: prefill, 32 decode steps, greedy text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import connect, disconnect
from nodes_here import nodes_here
from span.families import FAMILIES as SMALL_FAMILIES
from transformers import AutoModelForCausalLM

from petals_win.models.source import DEFAULT_MODEL, open_model

PROMPT = torch.tensor([[1, 40, 7, 300, 22, 5, 9, 41, 8, 100, 63, 12]])
SMALL = dict(vocab_size=320, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=256)
FAMILIES = {
    "llama": dict(num_key_value_heads=2, intermediate_size=128),  # grouped queries, as in Llama 2 70B
    "mistral": dict(num_key_value_heads=2, intermediate_size=128, sliding_window=16),
    "qwen3": dict(num_key_value_heads=2, intermediate_size=128, head_dim=32),
    "gpt2": dict(),
    "gemma3n_text": SMALL_FAMILIES["gemma3n_text"][1],  # more than a hidden state passes between nodes
}


def logits_step_by_step(model, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [1, prompt + tokens, vocab] of a prefill and one decode step for each token, with a cache."""
    outputs = model(prompt, use_cache=True)
    logits, cache = [outputs.logits], outputs.get("cache")
    for token in tokens.split(1, dim=1):
        outputs = model(token) if cache is None else model(token, cache=cache, use_cache=True)
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-4, or 1e-5 of the largest logit: how oneDNN adds float32 depends on the processor.

    With AVX-512 of AMD, SmolLM2's logits, up to about 27, are up to 1.1e-4 away from those in float64; transformers' own 5e-5.
    """
    largest = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=max(1e-4, 1e-5 * largest))


@torch.inference_mode()
def assert_same(remote, local, prompt: torch.Tensor) -> None:
    expected_text = local.generate(prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False)
    text = remote.generate(prompt, max_new_tokens=32, min_new_tokens=32, do_sample=False)
    assert torch.equal(text, expected_text)

    tokens = expected_text[:, prompt.shape[1] :]
    expected = logits_step_by_step(local, prompt, tokens)
    with remote.inference_session(max_length=prompt.shape[1] + 32):
        actual = logits_step_by_step(remote, prompt, tokens)
    assert_close(actual, expected)
    assert_close(remote(prompt).logits, expected[:, : prompt.shape[1]])  # rpc_forward


def test_smollm2(remote):
    source = open_model(DEFAULT_MODEL)
    prompt = source.tokenizer()("The capital of France is the city of", return_tensors="pt")["input_ids"]
    assert_same(remote, source.whole_model(), prompt)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, checkpoint):
    settings = SMALL | FAMILIES[family]
    folder = checkpoint(family, **settings)
    local = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Nodes of this process, whose p2pds are all that is between them: no six seconds of starting for each family.
    with nodes_here(folder, ["0:1", f"1:{settings['num_hidden_layers']}"]) as nodes:
        remote = connect(SimpleNamespace(peers=[nodes[0].peer]), str(folder))
        try:
            assert_same(remote, local, PROMPT)
        finally:
            disconnect(remote)


@torch.inference_mode()
def test_generate_as_transformers_does(remote):
    """Beams, a streamer, a session that goes on, and a batch."""
    source = open_model(DEFAULT_MODEL)
    tokenizer, local = source.tokenizer(), source.whole_model()
    prompt = tokenizer("Once upon a time, there was a", return_tensors="pt")["input_ids"]

    beams = dict(num_beams=3, max_new_tokens=12, do_sample=False)
    assert torch.equal(remote.generate(prompt, **beams), local.generate(prompt, **beams))

    batch = torch.cat([prompt, prompt.flip(1)])
    greedy = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(remote.generate(batch, **greedy), local.generate(batch, **greedy))

    whole = local.generate(prompt, max_new_tokens=9, do_sample=False)
    with remote.inference_session(max_length=64) as session:
        parts = [remote.generate(prompt, max_new_tokens=3, do_sample=False, session=session)]
        parts += [remote.generate(max_new_tokens=3, do_sample=False, session=session) for _ in range(2)]
    assert torch.equal(torch.cat(parts, dim=1), whole)

    torch.manual_seed(5)
    sampled = remote.generate(prompt, max_new_tokens=10, do_sample=True, temperature=0.8, top_p=0.9)
    torch.manual_seed(5)
    assert torch.equal(sampled, local.generate(prompt, max_new_tokens=10, do_sample=True, temperature=0.8, top_p=0.9))
