"""Small random models that chat: a tokenizer of characters, a chat template, and an end that comes by chance."""

from __future__ import annotations

import string
from pathlib import Path

from span.families import random_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

_SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]
_CHARACTERS = string.ascii_letters + string.digits + string.punctuation + "Ġ"
TEMPLATE = (
    "<s>{% for message in messages %}<{{ message.role }}>{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_chat_model(folder: Path, family: str = "llama", *, context: int, ends: int = 6, **changes) -> Path:
    """Save a model of one of the families with a context of so many tokens; `ends` of its 100 tokens end an answer.

    It answers by drawing tokens, so that an answer without a limit ends after some; with no `ends` it never does.
    """
    vocabulary = {text: number for number, text in enumerate([*_SPECIAL, *_CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=context
    )
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    fast.chat_template = TEMPLATE
    model = random_model(family, vocab_size=len(vocabulary), max_position_embeddings=context, **changes)
    model.config.eos_token_id = [2, *range(10, 10 + ends)] if ends else None
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=model.config.eos_token_id, bos_token_id=1, pad_token_id=0
    )
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
