"""Two blocks with the true shapes of Llama 2 70B, one on each of two nodes.

The weights are random and the vocabulary is cut; everything else of a block is as in the real model.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import connect, disconnect
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from petals_win.swarm.local import LocalSwarm

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE, VOCABULARY = 8192, 64, 8, 28672, 512
BLOCK_PARAMETERS = (
    2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN * KV_HEADS // HEADS + 3 * HIDDEN * INTERMEDIATE + 2 * HIDDEN
)
MIB = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Written tensor by tensor, a shard for each block: a model made first would take twice the memory."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        # A tensor's rows repeat after 1024, in another order of columns, for drawing all numbers takes a minute.
        drawn = torch.randn(min(rows, 1024), columns, generator=generator) * columns**-0.5
        parts = [drawn.roll(97 * n, dims=1) for n in range(-(-rows // 1024))]
        return torch.cat([part.bfloat16() for part in parts])[:rows].contiguous()

    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    key_size = HIDDEN * KV_HEADS // HEADS
    weight_map: dict[str, str] = {}
    for block in (0, 1):
        prefix = f"model.layers.{block}."
        shard = {
            "self_attn.q_proj": random(HIDDEN, HIDDEN),
            "self_attn.k_proj": random(key_size, HIDDEN),
            "self_attn.v_proj": random(key_size, HIDDEN),
            "self_attn.o_proj": random(HIDDEN, HIDDEN),
            "mlp.gate_proj": random(INTERMEDIATE, HIDDEN),
            "mlp.up_proj": random(INTERMEDIATE, HIDDEN),
            "mlp.down_proj": random(HIDDEN, INTERMEDIATE),
            "input_layernorm": norm.clone(),
            "post_attention_layernorm": norm.clone(),
        }
        _write(
            tmp_path,
            f"block{block}.safetensors",
            {f"{prefix}{name}.weight": t for name, t in shard.items()},
            weight_map,
        )
    rest = {
        "model.embed_tokens.weight": random(VOCABULARY, HIDDEN) * HIDDEN**0.5,
        "model.norm.weight": norm.clone(),
        "lm_head.weight": random(VOCABULARY, HIDDEN),
    }
    _write(tmp_path, "rest.safetensors", rest, weight_map)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def _write(folder: Path, file: str, tensors: dict[str, torch.Tensor], weight_map: dict[str, str]) -> None:
    save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(tensors, file))


@torch.inference_mode()
def logits_of(model, prompt: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Of a prefill and one decode step for each token, in float32; and the seconds of each."""
    logits, seconds, cache = [], [], None
    for step in (prompt, *tokens.split(1, dim=1)):
        began = time.perf_counter()
        outputs = model(step, use_cache=True) if cache is None else model(step, cache=cache, use_cache=True)
        seconds.append(time.perf_counter() - began)
        cache = outputs.get("cache")
        logits.append(outputs.logits.float())
    return torch.cat(logits, dim=1), seconds


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_true_blocks_on_two_nodes(folder, capsys):
    generator = torch.Generator().manual_seed(1)
    prompt, tokens = (torch.randint(3, VOCABULARY, (1, n), generator=generator) for n in (16, 4))
    with LocalSwarm(str(folder), ["0:1", "1:2"]) as swarm:
        swarm.wait_until_serving()
        remote = connect(swarm, str(folder), torch_dtype=torch.bfloat16)
        try:
            with remote.inference_session(max_length=32):
                logits, seconds = logits_of(remote, prompt, tokens)
            memory = [psutil.Process(node.child.pid).memory_info().rss for node in swarm.nodes]
            before = [node.bytes_before_loading for node in swarm.nodes]
        finally:
            disconnect(remote)

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    in_bfloat16, _ = logits_of(reference, prompt, tokens)
    exact, _ = logits_of(reference.float(), prompt, tokens)

    # Any way of computing in bfloat16 differs from the exact logits. The swarm's may by no more than transformers' own
    # does, but for the luck of single roundings: both sum the same products, in another order.
    ours, theirs = logits - exact, in_bfloat16 - exact
    assert theirs.abs().max() > 0, "it is bfloat16"
    assert ours.pow(2).mean().sqrt() <= 1.25 * theirs.pow(2).mean().sqrt()
    assert ours.abs().max() <= 2 * theirs.abs().max()
    assert theirs.abs().max() < 0.1 * exact.abs().max(), "else the bound would say nothing"

    block = 2 * BLOCK_PARAMETERS
    with capsys.disabled():
        print(
            f"\nOne block of Llama 2 70B in bfloat16, {block / MIB:,.0f} MiB of weights:\n"
            f"  memory of the nodes {', '.join(f'{bytes / MIB:,.0f}' for bytes in memory)} MiB, "
            f"before loading {', '.join(f'{bytes / MIB:,.0f}' for bytes in before)} MiB\n"
            f"  a step of one token through both blocks {sorted(seconds[1:])[len(seconds[1:]) // 2]:.2f} s, "
            f"a prefill of {prompt.shape[1]} tokens {seconds[0]:.2f} s\n"
            f"  logits: rms error {ours.pow(2).mean().sqrt():.2e}, transformers' in bfloat16 {theirs.pow(2).mean().sqrt():.2e}, "
            f"of logits up to {exact.abs().max():.1f}"
        )
    for held, at_start in zip(memory, before, strict=True):
        assert held - at_start <= 1.1 * block + 300 * MIB
