"""A random Llama that knows bytes, for measurements in which what is said does not matter: `python -m petals_win.bench.tiny_model FOLDER SHAPE`.

In a process of its own, so that whoever measures memory has no torch in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from petals_win.errors import UserError

_MAKING_S = 300
_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass(frozen=True)
class TinyShape:
    """Of 257 tokens `ends` end an answer, so that one that is drawn without a limit has about 257 / `ends`; 0: it never ends by itself."""

    context: int = 1024
    blocks: int = 2
    heads: int = 4
    heads_of_keys: int = 2
    ends: int = 1


def make_tiny_model(folder: Path, shape: TinyShape | None = None) -> Path:
    """Returns the folder. Raises UserError if it cannot be made."""
    command = [
        sys.executable,
        "-m",
        "petals_win.bench.tiny_model",
        str(folder),
        json.dumps(asdict(shape or TinyShape())),
    ]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=_MAKING_S
    )
    if done.returncode != 0:
        raise UserError(f"The tiny model could not be made:\n{done.stderr[-2000:]}")
    return folder


def _make(folder: Path, shape: TinyShape) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    ends = list(range(shape.ends)) or None
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads_of_keys,
        max_position_embeddings=shape.context,
        bos_token_id=None,
        eos_token_id=ends,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    # With weights as small as they are made all tokens look alike, and of a long text each token is as good as any other to attend to.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(12 if name.endswith(("q_proj.weight", "k_proj.weight")) else 3)
    model.generation_config = GenerationConfig(do_sample=True, eos_token_id=ends, top_k=0)
    model.save_pretrained(folder)


if __name__ == "__main__":
    _make(Path(sys.argv[1]), TinyShape(**json.loads(sys.argv[2])))
