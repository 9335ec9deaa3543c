"""The text of a GGUF file: its tokens are those that llama.cpp counts, and an answer ends where its turn does."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from span.families import VOCABULARY
from tokenizers import pre_tokenizers

from models.gguf_writer import BEGIN, CALL, END_OF_TEXT, END_OF_TURN, byte_alphabet, vocabulary, write_gguf
from petals_win.errors import UserError
from petals_win.models.default_model import default_model_file
from petals_win.models.gguf_tokenizer import GgufTokenizer
from petals_win.models.source import ModelSource, open_model

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def _own_cache(home: Path) -> None:
    """Descriptions of files go into a folder of this test."""


@pytest.fixture
def with_text(checkpoint, tmp_path):
    """Opens a GGUF file of a tiny model with these keys about its text."""
    model = open_model(str(checkpoint("llama"))).whole_model()

    def make(keys: dict, without: tuple[str, ...] = ()) -> ModelSource:
        return open_model(str(write_gguf(model, tmp_path / "tiny.gguf", keys, without=without)))

    return make


def ends(source: ModelSource) -> list[int]:
    generation = source.generation_config()
    assert generation is not None
    return generation.eos_token_id


UNNAMED = ["<|endoftext|>", "<s>", "[turn over]", "[call over]"]


@pytest.mark.parametrize(
    "keys, wanted",
    [
        ({}, [END_OF_TEXT]),
        ({"tokenizer.ggml.eot_token_id": END_OF_TURN}, [END_OF_TEXT, END_OF_TURN]),
        ({"tokenizer.ggml.eom_token_id": CALL}, [END_OF_TEXT, CALL]),
        ({"tokenizer.ggml.eos_token_id": END_OF_TURN}, [END_OF_TURN]),
        ({"tokenizer.ggml.eot_token_id": VOCABULARY}, [END_OF_TEXT]),
        ({"tokenizer.chat_template": CHATML.replace("<|im_end|>", "[turn over]")}, [END_OF_TEXT, END_OF_TURN]),
        ({"tokenizer.chat_template": "{{ raise_exception('no') }}"}, [END_OF_TEXT]),
        ({"tokenizer.chat_template": "{% for"}, [END_OF_TEXT]),
        (
            {"tokenizer.chat_template": "{% for message in messages %}{{ message.content }}.\n{% endfor %}"},
            [END_OF_TEXT],
        ),
    ],
)
def test_what_ends_an_answer(with_text, keys, wanted):
    assert ends(with_text({**vocabulary(VOCABULARY, UNNAMED), **keys})) == wanted


def test_the_model_generates_with_these_ends(with_text):
    source = with_text({"tokenizer.ggml.eot_token_id": CALL})
    wanted = [END_OF_TEXT, CALL, END_OF_TURN]
    assert ends(source) == source.whole_model().generation_config.eos_token_id == wanted


def test_an_end_of_turn_that_only_its_name_tells(with_text):
    assert ends(with_text({})) == [END_OF_TEXT, END_OF_TURN]


def test_a_file_without_any_end(with_text):
    keys = vocabulary(VOCABULARY, UNNAMED)
    assert ends(with_text(keys, without=("tokenizer.ggml.eos_token_id",))) is None


@pytest.fixture(scope="session")
def default_model() -> Path:
    """Where the user has it: found before a test has a home of its own."""
    return default_model_file()


def test_the_default_model_s_file_with_another_end_stops_behind_its_answer(default_model, tmp_path):
    """As files are that name the end of all text as eos and the end of a turn as eot: there, the turn must end the answer."""
    data = default_model.read_bytes()
    for before, after, value in ((b"eos_token_id", b"eos_token_id", 0), (b"bos_token_id", b"eot_token_id", 2)):
        key = b"tokenizer.ggml." + before
        at = data.index(key)
        number = at + len(key) + 4
        data = (
            data[:at] + b"tokenizer.ggml." + after + data[at + len(key) : number] + bytes([value]) + data[number + 1 :]
        )
    (tmp_path / "SmolLM2-135M-Instruct.gguf").write_bytes(data)
    source = open_model(str(tmp_path / "SmolLM2-135M-Instruct.gguf"))
    assert ends(source) == [0, 2]
    assert source.is_quantized_gguf and source.dtype is torch.float32, "small enough for the fastest way on a CPU"
    tokenizer = source.tokenizer()
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    answer = source.whole_model().generate(prompt, max_new_tokens=32, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]


def test_control_tokens_outside_of_the_alphabet_of_bytes(with_text):
    """DeepSeek's begin with a fullwidth bar; they stay the tokens that they are, instead of new ones beyond the vocabulary."""
    keys = vocabulary(VOCABULARY, DEEPSEEK) | {
        "tokenizer.ggml.pre": "deepseek-llm",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
    }
    source = with_text(keys)
    tokenizer = source.tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (0, 1, VOCABULARY)
    alphabet = byte_alphabet()
    space = 4 + alphabet.index("Ġ")
    byte = {letter: 4 + alphabet.index(letter) for letter in "aParis"}
    paris = 4 + 256 + 3
    assert tokenizer.encode("<｜User｜>Paris a") == [0, 2, paris, space, byte["a"]]
    assert tokenizer.decode([0, 2, paris, space, byte["a"], 1]) == "".join(
        [DEEPSEEK[0], DEEPSEEK[2], "Paris a", DEEPSEEK[1]]
    )
    assert tokenizer.decode([0, 2, paris, 1], skip_special_tokens=True) == "Paris"
    ids = torch.tensor([tokenizer.encode("Paris")])
    assert ends(source)[0] == 1 and source.whole_model()(ids).logits.shape[-1] == VOCABULARY


@pytest.mark.parametrize(
    "rule, add, wanted",
    [
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("tekken", None, True),
        ("deepseek-llm", None, False),
    ],
)
def test_whether_a_text_begins_with_the_token_of_the_beginning(with_text, rule, add, wanted):
    keys = {"tokenizer.ggml.pre": rule} | ({} if add is None else {"tokenizer.ggml.add_bos_token": add})
    without = ("tokenizer.ggml.add_bos_token",) if add is None else ()
    tokenizer = with_text(keys, without).tokenizer()
    assert (tokenizer.encode("Paris")[0] == BEGIN) is wanted
    assert tokenizer.encode("Paris", add_special_tokens=False) == [4 + 256 + 3]


def test_a_text_may_end_with_the_token_of_the_end(with_text):
    tokenizer = with_text({"tokenizer.ggml.add_eos_token": True}).tokenizer()
    assert tokenizer.encode("Paris") == [4 + 256 + 3, END_OF_TEXT]


@pytest.mark.parametrize("rule, wanted", [("llama-bpe", ["Paris"]), ("gpt-2", ["Pa", "r", "i", "s"])])
def test_whole_words_need_no_merges(with_text, rule, wanted):
    tokenizer = with_text({"tokenizer.ggml.pre": rule, "tokenizer.ggml.merges": ["P a"]}).tokenizer()
    assert tokenizer.tokenize("Paris") == wanted


TEXT = "Don't pay $12345 (5,0%) to Ärzte  in 北京!\n\n x"
WORDS = {
    "gpt-2": [
        "Don",
        "'t",
        " pay",
        " $",
        "12345",
        " (",
        "5",
        ",",
        "0",
        "%)",
        " to",
        " Ärzte",
        " ",
        " in",
        " 北京",
        "!",
        "\n\n",
        " x",
    ],
    "smollm": [
        *[
            "Don",
            "'t",
            " pay",
            " $",
            "1",
            "2",
            "3",
            "4",
            "5",
            " (",
            "5",
            ",",
            "0",
            "%)",
            " to",
            " Ärzte",
            " ",
            " in",
            " 北京",
            "!",
        ],
        *["\n\n", " x"],
    ],
    "falcon": [
        *[
            "Don",
            "'",
            "t",
            " pay",
            " ",
            "$",
            "123",
            "45",
            " ",
            "(",
            "5",
            ",",
            "0",
            "%)",
            " to",
            " Ärzte",
            " ",
            " in",
            " 北京",
            "!",
        ],
        *["\n\n", " x"],
    ],
    "default": [
        *[
            "Don",
            "'",
            "t",
            " pay",
            " ",
            "$",
            "123",
            "45",
            " ",
            "(",
            "5",
            ",",
            "0",
            "%)",
            " to",
            " Ärzte",
            " ",
            " in",
            " 北京",
            "!",
        ],
        *["\n\n", " x"],
    ],
    "llama-bpe": [
        *[
            "Don",
            "'t",
            " pay",
            " $",
            "123",
            "45",
            " (",
            "5",
            ",",
            "0",
            "%)",
            " to",
            " Ärzte",
            " ",
            " in",
            " 北京",
            "!\n\n",
            " x",
        ],
    ],
    "qwen2": [
        *[
            "Don",
            "'t",
            " pay",
            " $",
            "1",
            "2",
            "3",
            "4",
            "5",
            " (",
            "5",
            ",",
            "0",
            "%)",
            " to",
            " Ärzte",
            " ",
            " in",
            " 北京",
        ],
        *["!\n\n", " x"],
    ],
    "deepseek-llm": [
        *[
            "Don",
            "'",
            "t",
            " pay",
            " $",
            "12345",
            " (",
            "5",
            ",",
            "0",
            "%)",
            " to",
            " Ä",
            "rzte",
            " ",
            " in",
            " ",
            "北京",
            "!",
        ],
        *["\n", "\n", " x"],
    ],
    "deepseek-coder": [
        *[
            "Don",
            "'",
            "t",
            " pay",
            " $",
            "1",
            "2",
            "3",
            "4",
            "5",
            " (",
            "5",
            ",",
            "0",
            "%)",
            " to",
            " Ärzte",
            " ",
            " in",
            " ",
            "北京",
            "!",
        ],
        *["\n", "\n", " x"],
    ],
    "deepseek-v3": [
        *[
            "Don",
            "'t",
            " pay",
            " $",
            "123",
            "45",
            " (",
            "5",
            ",",
            "0",
            "%)",
            " to",
            " Ärzte",
            " ",
            " in",
            " ",
            "北京",
            "!\n\n",
            " x",
        ],
    ],
}


@pytest.mark.parametrize("rule", WORDS)
def test_words_are_told_apart_by_the_file_s_rule(rule):
    keys = vocabulary(VOCABULARY) | {"general.architecture": "llama", "tokenizer.ggml.pre": rule}
    backend = GgufTokenizer("tiny.gguf", keys, VOCABULARY).tokenizer.backend_tokenizer
    alphabet = byte_alphabet()
    found = [
        bytes(alphabet.index(letter) for letter in word).decode()
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(TEXT)
    ]
    assert "".join(found) == TEXT
    assert found == WORDS[rule]


def test_a_file_that_names_no_rule_has_llama_cpp_s_default():
    keys = vocabulary(VOCABULARY) | {"general.architecture": "llama"}
    del keys["tokenizer.ggml.pre"]
    unnamed = GgufTokenizer("tiny.gguf", keys, VOCABULARY).tokenizer.backend_tokenizer
    named = GgufTokenizer(
        "tiny.gguf", {**keys, "tokenizer.ggml.pre": "default"}, VOCABULARY
    ).tokenizer.backend_tokenizer
    assert isinstance(unnamed.pre_tokenizer, pre_tokenizers.PreTokenizer)
    assert unnamed.to_str() == named.to_str()


SPM_CONTROL = ["<unk>", "<s>", "</s>", "[INST]"]


def sentencepiece(**keys) -> dict:
    words = ["▁", "P", "a", "r", "i", "s", "Pa", "ri", "ris", "Paris", "▁Paris"]
    tokens = [*SPM_CONTROL, *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokens += [f"<unused{index}>" for index in range(VOCABULARY - len(tokens))]
    types = [2, 3, 3, 3] + [6] * 256 + [1] * len(words)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types + [5] * (VOCABULARY - len(types)),
        "tokenizer.ggml.scores": [-float(index) if index < 270 else 0.0 for index in range(VOCABULARY)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


SPM_ONLY = ("tokenizer.ggml.pre", "tokenizer.ggml.merges", "tokenizer.ggml.add_bos_token")


@pytest.mark.parametrize(
    "keys, text, wanted",
    [
        ({}, "Paris", ["<s>", "▁Paris"]),
        ({}, "[INST]Paris", ["<s>", "[INST]", "▁Paris"]),
        ({}, " Paris", ["<s>", "▁", "▁Paris"]),
        ({"add_space_prefix": False}, "Paris", ["<s>", "Paris"]),
        ({"add_space_prefix": False}, "[INST] Paris", ["<s>", "[INST]", "▁Paris"]),
        ({}, "Paris!", ["<s>", "▁Paris", "<0x21>"]),
    ],
)
def test_sentencepiece(with_text, keys, text, wanted):
    """It begins with BOS even if no key says so, and a space precedes the text and what follows a control token."""
    tokenizer = with_text(sentencepiece(**keys), SPM_ONLY).tokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids) == wanted
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.replace("[INST]", "").strip()


def test_sentencepiece_without_a_beginning(with_text):
    tokenizer = with_text({**sentencepiece(), "tokenizer.ggml.add_bos_token": False}, SPM_ONLY[:2]).tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("Paris")) == ["▁Paris"]


GEMMA_4 = {
    **sentencepiece(add_bos_token=True, add_space_prefix=False),
    "tokenizer.ggml.model": "gemma4",
    "tokenizer.ggml.merges": ["P a", "r i", "ri s", "Pa ris", "▁ Paris"],
}


def test_pieces_with_merges_as_gemma_4_has_them(with_text):
    """Nothing precedes a text but BOS, and what is no piece is its bytes."""
    tokenizer = with_text(GEMMA_4, SPM_ONLY[:1]).tokenizer()
    ids = tokenizer.encode("Paris Paris[INST]\nris")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "Paris", "▁Paris", "[INST]", "<0x0A>", "ris"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Paris Paris\nris"
    with pytest.raises(UserError, match="has a vocabulary without merges"):
        with_text(GEMMA_4, SPM_ONLY[:2])


def test_the_chat_template_is_the_file_s(with_text):
    tokenizer = with_text({"tokenizer.chat_template": CHATML}).tokenizer()
    assert tokenizer.chat_template == CHATML
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert with_text({}).tokenizer().chat_template is None


def test_named_chat_templates(with_text, tmp_path):
    """The one for tools is taken where there are tools. A name is no path."""
    tools = CHATML.replace("<|im_start|>", "TOOLS<|im_start|>", 1)
    keys = {"tokenizer.chat_template": CHATML, "tokenizer.chat_templates": ["tool_use", "../../evil"]}
    keys |= {"tokenizer.chat_template.tool_use": tools, "tokenizer.chat_template.../../evil": "X"}
    source = with_text(keys)
    assert ends(source) == [END_OF_TEXT, END_OF_TURN]
    tokenizer = source.tokenizer()
    assert tokenizer.chat_template == {"default": CHATML, "tool_use": tools}
    asked: dict = {"conversation": [{"role": "user", "content": "Hi"}], "tokenize": False}
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    assert tokenizer.apply_chat_template(**asked).startswith("<|im_start|>")
    assert tokenizer.apply_chat_template(**asked, tools=[tool]).startswith("TOOLS")
    assert not list(tmp_path.rglob("*evil*"))


def test_named_chat_templates_alone(with_text):
    tokenizer = with_text({"tokenizer.chat_template.rag": CHATML}).tokenizer()
    assert tokenizer.chat_template == {"rag": CHATML}


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"tokenizer.ggml.pre": "superbpe"}, r"words apart by the rule superbpe \(tokenizer.ggml.pre\)"),
        ({"tokenizer.ggml.model": "rwkv"}, r"tokenizer of the kind rwkv \(tokenizer.ggml.model\)"),
        (vocabulary(VOCABULARY + 1), "has 321 tokens, but embeddings of 320"),
        ({"tokenizer.ggml.merges": ["Paris"]}, "tokenizer that is damaged"),
        ({"tokenizer.ggml.merges": ["x y"]}, "tokenizer that is damaged"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_refused_by_name(with_text, keys, says):
    with pytest.raises(UserError, match=f"tiny.gguf.*{says}"):
        with_text(keys)


def test_no_vocabulary_at_all(with_text):
    with pytest.raises(UserError, match="tiny.gguf has no complete vocabulary"):
        with_text({}, without=("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"))


def test_a_vocabulary_smaller_than_the_embeddings(with_text):
    tokenizer = with_text(vocabulary(VOCABULARY - 8)).tokenizer()
    assert len(tokenizer) == VOCABULARY - 8


def test_a_special_token_beyond_the_vocabulary_is_ignored_with_a_line(with_text, caplog):
    with caplog.at_level(logging.WARNING, "petals_win"):
        tokenizer = with_text({"tokenizer.ggml.bos_token_id": VOCABULARY}).tokenizer()
    assert "tokenizer.ggml.bos_token_id is 320, beyond the 320 tokens" in caplog.text
    assert tokenizer.bos_token is None and max(tokenizer.get_vocab().values()) < VOCABULARY
