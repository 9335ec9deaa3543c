"""A random Llama that knows bytes, for measurements in which what is said does not matter: `python -m petals_win.bench.tiny_model FOLDER`.

In a process of its own, so that whoever measures memory has no torch in it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from petals_win.errors import UserError

_MAKING_S = 300


def make_tiny_model(folder: Path) -> Path:
    """Returns the folder. Raises UserError if it cannot be made."""
    command = [sys.executable, "-m", "petals_win.bench.tiny_model", str(folder)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=_MAKING_S
    )
    if done.returncode != 0:
        raise UserError(f"The tiny model could not be made:\n{done.stderr[-2000:]}")
    return folder


def _make(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


if __name__ == "__main__":
    _make(Path(sys.argv[1]))
