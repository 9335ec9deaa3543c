"""The tokenizer that a GGUF file describes, with the tokens that end an answer, as llama.cpp counts and ends.

Knows the keys below `tokenizer.` and how llama.cpp tells words apart. Does not know tensors.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from petals_win.errors import UserError
from petals_win.models.transformers_internals import pre_tokenizer_split, sentencepiece_backend

logger = logging.getLogger(__name__)

_TEMPLATE = "tokenizer.chat_template"

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
_OF_GEMMA_4 = "gemma4"  # tokenizer.ggml.model: pieces of sentencepiece with merges
_GEMMA = ("gemma", "gemma2", "gemma3", "gemma3n")  # whose sentencepiece never puts a space before the text

# Vocabularies whose words are looked up whole before anything is merged, and that begin a text if no key says whether.
_WHOLE_WORDS = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"
}  # fmt: skip

# How words are told apart, by tokenizer.ggml.pre: one rule after the other, each within what the one before left.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED = r"[[\p{Lu}\p{Ll}\p{Lt}]&&[^\u0560-\u0588\u10d0-\u10ff]]"
_ASIAN = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DIGIT_BY_DIGIT = [r"\p{N}", _GPT2]
_RULES: dict[str, list[str]] = {
    "default": [r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9]{3}"],
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "roberta-bpe", "gigachat", "mellum"), [_GPT2]
    ),
    **dict.fromkeys(
        ("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _DIGIT_BY_DIGIT
    ),
    "falcon": [r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9]{3}"],
    "deepseek-llm": [
        r"[\r\n]",
        rf"\s?{_CASED}+",
        r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        r"\s+$",
        _ASIAN,
        r"\p{N}+",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, r"\p{N}"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
}
_SAME_RULE = {"stablelm2": "qwen2", "glm4": "llama-bpe", "chatglm-bpe": "llama-bpe"}

# What ends a turn in well-known templates; files made before there were keys for it name such a token nowhere.
_ENDS_OF_TURNS = {
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|end_of_turn|>",
    "<|endofturn|>",
    "<EOT>",
}


class GgufTokenizer:
    """The tokenizer of one file."""

    def __init__(self, name: str, metadata: Mapping[str, Any], vocabulary_size: int) -> None:
        """`metadata` has the file's keys; `vocabulary_size` is how many tokens have an embedding; `name` is for messages.

        Raises UserError for a vocabulary that does not fit the model, or words told apart in an unknown way.
        """
        self._name = name
        self._metadata = metadata
        self._tokens: list[str] = self._list("tokens", str)
        self._types: list[int] = self._list("token_type", int) or [_NORMAL] * len(self._tokens)
        if not self._tokens or len(self._types) != len(self._tokens):
            raise UserError(f"{name} has no complete vocabulary. Use the model's safetensors files instead.")
        if len(self._tokens) > vocabulary_size:
            raise UserError(
                f"{name} has {len(self._tokens)} tokens, but embeddings of {vocabulary_size}: it is damaged or was changed. "
                "Download another version of it."
            )
        model = self._get("model")
        if model not in ("gpt2", "llama", _OF_GEMMA_4):
            raise UserError(
                f"{name} has a tokenizer of the kind {model} (tokenizer.ggml.model), which petals-win cannot follow yet. "
                "Use the model's safetensors files instead."
            )
        try:
            backend = self._byte_level() if model == "gpt2" else self._sentencepiece(metadata["general.architecture"])
        except UserError:
            raise
        except Exception as e:  # the tokenizers package raises nothing more special
            raise UserError(f"{name} has a tokenizer that is damaged: {e}. Download another version of it.") from e
        roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            add_bos_token=bool(
                self._get("add_bos_token", model in ("llama", _OF_GEMMA_4) or str(self._get("pre")) in _WHOLE_WORDS)
            ),
            add_eos_token=bool(self._get("add_eos_token", False)),
            clean_up_tokenization_spaces=False,
            **{role: self._text(key) for role, key in roles.items()},
            **self._templates(),
        )

    def ends(self) -> list[int]:
        """The tokens that end an answer: those that keys name, what the chat template puts behind one, and those known by name."""
        found = [self._token(key) for key in ("eos", "eot", "eom")]
        found.append(self._behind_an_answer())
        control = [index for index, kind in enumerate(self._types) if kind in (_CONTROL, _USER_DEFINED)]
        found += [index for index in control if self._tokens[index] in _ENDS_OF_TURNS]
        return list(dict.fromkeys(token for token in found if token is not None))

    def _templates(self) -> dict[str, Any]:
        """The chat template; all of them by name, if there are variants, such as one for tools."""
        plain = self._metadata.get(_TEMPLATE)
        found = {"default": plain} if isinstance(plain, str) and plain else {}
        for key, template in self._metadata.items():
            name = key.removeprefix(f"{_TEMPLATE}.")
            if name == key or not isinstance(template, str):
                continue
            if re.fullmatch(r"\w+", name, re.ASCII):  # it becomes the name of a file
                found.setdefault(name, template)
            else:
                logger.warning("%s: the chat template %r is left out, since its name is none", self._name, name)
        if found.keys() == {"default"}:
            return {"chat_template": plain}
        return {"chat_template": found} if found else {}

    def _get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def _list(self, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        """Empty if the file has no such list, and for a list of something else."""
        found = self._get(key)
        return found if isinstance(found, list) and all(isinstance(entry, kind) for entry in found) else []

    def _token(self, key: str) -> int | None:
        """The token that a key names. llama.cpp, too, goes on without one that is beyond the vocabulary."""
        token = self._get(f"{key}_token_id")
        if token is None or (isinstance(token, int) and 0 <= token < len(self._tokens)):
            return token
        logger.warning(
            "%s: tokenizer.ggml.%s_token_id is %s, beyond the %d tokens of the vocabulary; it is ignored",
            self._name,
            key,
            token,
            len(self._tokens),
        )
        return None

    def _text(self, key: str) -> str | None:
        token = self._token(key)
        return None if token is None else self._tokens[token]

    def _byte_level(self) -> Tokenizer:
        """Byte-level BPE. Control and user-defined tokens are spelled as they are, all others in the alphabet of bytes."""
        rule = str(self._get("pre", "default"))
        rule = _SAME_RULE.get(rule, rule)
        known = pre_tokenizer_split(rule)
        splits = [known] if known is not None else _RULES.get(rule)
        if splits is None:
            raise UserError(
                f"{self._name} tells words apart by the rule {rule} (tokenizer.ggml.pre), which petals-win cannot follow yet. "
                "Use the model's safetensors files instead."
            )
        vocabulary = {token: index for index, token in enumerate(self._tokens)}
        merges = [tuple(merge.split(" ", 1)) for merge in self._list("merges", str)]
        model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule in _WHOLE_WORDS)
        backend = Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in splits]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER_DEFINED, backend.add_tokens)):
            tokens = [token for token, found in zip(self._tokens, self._types, strict=True) if found == kind]
            add([AddedToken(token, normalized=False, special=kind == _CONTROL) for token in tokens])
        return backend

    def _sentencepiece(self, architecture: str) -> Tokenizer:
        model = self._get("model")
        vocabulary = {"tokenizer_type": model, "tokens": self._tokens, "token_type": self._types}
        if merges := self._list("merges", str):
            vocabulary["merges"] = merges
        elif model == _OF_GEMMA_4:  # its scores do not tell their order
            raise UserError(
                f"{self._name} has a vocabulary without merges. Use the model's safetensors files instead."
            )
        elif len(scores := self._list("scores", (int, float))) == len(self._tokens):
            vocabulary["scores"] = scores
        else:
            raise UserError(
                f"{self._name} has a vocabulary without scores. Use the model's safetensors files instead."
            )
        # transformers knows that of Gemma 3n by the name of the model before it.
        backend = sentencepiece_backend("gemma3" if architecture in _GEMMA else architecture, vocabulary)
        if model == _OF_GEMMA_4 or architecture in _GEMMA:
            return backend
        spaces = normalizers.Replace(" ", "▁")
        decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.pre_tokenizer = None
        if self._get("add_space_prefix", True):  # before the text, and again behind each control token
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
            backend.decoder = decoders.Sequence([*decoder, decoders.Strip(" ", left=1, right=0)])
        else:
            backend.normalizer = normalizers.Sequence([spaces])
            backend.decoder = decoders.Sequence(decoder)
        return backend

    def _behind_an_answer(self) -> int | None:
        if not self.tokenizer.chat_template:
            return None
        answer = "Paris"
        turns = [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": answer},
        ]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except (TemplateError, TypeError, ValueError, KeyError) as e:  # it may want other turns, or be no template
            logger.debug("The chat template of %s says nothing of the end of a turn: %s", self._name, e)
            return None
        _, answered, rest = str(text).rpartition(answer)
        behind = self.tokenizer.encode(rest.lstrip(), add_special_tokens=False) if answered else []
        return behind[0] if behind and self._types[behind[0]] in (_CONTROL, _USER_DEFINED) else None
