"""The runtime in runtimes/llama.c: building it by the compiler of the kernels, and writing a model as it reads one."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from petals_win.kernels.build import find_zig

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).parent / "runtimes" / "llama.c"
_BUILD_S = 600
# With Windows' own C library alone: the compiler would need minutes to build what it has beside that.
_WINDOWS = (
    "-target x86_64-windows-gnu -nostdlib -D__USE_MINGW_ANSI_STDIO=0 -Wl,-e,mainCRTStartup -lkernel32 -lucrtbase"
)
_FLAGS = "-O2 -std=c11 -Wall -Wextra -Werror -fno-sanitize=all"


def build_runtime(folder: Path, *, windows: bool = sys.platform == "win32") -> Path:
    """The program, in `folder`, for this system or for Windows on amd64."""
    program = folder / ("llama.exe" if windows else "llama")
    cache = str(ROOT / "build" / "zig-tests-cache")
    zig = find_zig(ROOT)
    command = [zig, "cc", *_FLAGS.split(), SOURCE, "-o", program]
    if windows:  # without its library the compiler does not look for its headers either
        command += [*_WINDOWS.split(), "-isystem", zig.resolve().parent / "lib/libc/include/any-windows-any"]
    else:
        command += ["-lm"]
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
    done = subprocess.run(
        list(map(str, command)),
        env=environment,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=_BUILD_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return program


def write_model(folder: Path, target: Path) -> Path:
    """A model of `tiny_chat`, of the family llama, in one file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config: Any = model.config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    controls = 5
    head_size = model.model.layers[0].self_attn.head_dim
    sizes = (
        config.vocab_size,
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_size,
        config.intermediate_size,
        config.max_position_embeddings,
        controls,
        -1 if config.eos_token_id is None else config.eos_token_id,
    )
    weights = [model.model.embed_tokens.weight]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        weights += [layer.input_layernorm.weight, *(each.weight for each in projections)]
        weights += [
            layer.post_attention_layernorm.weight,
            mlp.gate_proj.weight,
            mlp.up_proj.weight,
            mlp.down_proj.weight,
        ]
    weights += [model.model.norm.weight, model.lm_head.weight]
    with target.open("wb") as file:
        file.write(b"TINY" + struct.pack("<10i2f", *sizes, config.rms_norm_eps, config.rope_parameters["rope_theta"]))
        for token in range(config.vocab_size):
            text = tokenizer.convert_ids_to_tokens(token).replace("Ġ", " ").encode()
            file.write(struct.pack("<i", len(text)) + text)
        for weight in weights:
            file.write(weight.detach().numpy().astype("<f4").tobytes())
    return target
