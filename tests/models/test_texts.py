"""Tokenizers, chat templates and settings of generation in the forms in which models are published, and names of folders."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chat import TEMPLATE, tiny_chat_model
from transformers import GenerationConfig, PreTrainedModel

from petals_win.client.hollow import hollow_model
from petals_win.engines.base import GenerationRequest
from petals_win.engines.prompts import PromptEncoder
from petals_win.engines.sampling import sampler
from petals_win.engines.tokens import Language
from petals_win.errors import UserError
from petals_win.models.source import open_model

TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}
WITH_TOOLS = "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}" + TEMPLATE
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role here') }}{% endif %}" + TEMPLATE
TURNS = ({"role": "user", "content": "Hi"},)


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("texts") / "chats", context=128)


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A model without a chat template, whose other files are to be changed."""
    copied = Path(shutil.copytree(whole, tmp_path / "chats"))
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    described = json.loads((copied / "tokenizer_config.json").read_text())
    described.pop("chat_template", None)
    (copied / "tokenizer_config.json").write_text(json.dumps(described))
    return copied


def say(folder: Path, file: str, **changes: Any) -> None:
    described = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**described, **changes}))


def prompt(folder: Path, turns: tuple[dict, ...] = TURNS, **asked: Any) -> str:
    source = open_model(str(folder))
    tokenizer = source.tokenizer()
    request = GenerationRequest(model="chats", messages=turns, **asked)
    return tokenizer.decode(PromptEncoder("chats", tokenizer, 100).encode(request).tokens)


def test_a_template_in_a_file_of_its_own(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert prompt(folder) == "<s><user>Hi</s><assistant>"


def test_the_file_of_its_own_is_the_newer_one(folder):
    say(folder, "tokenizer_config.json", chat_template="OLD")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert prompt(folder) == "<s><user>Hi</s><assistant>"


@pytest.mark.parametrize("form", ["a list", "files"])
def test_templates_by_name(folder, form):
    if form == "a list":
        named = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": WITH_TOOLS}]
        say(folder, "tokenizer_config.json", chat_template=named)
    else:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(WITH_TOOLS)
    assert prompt(folder) == "<s><user>Hi</s><assistant>"
    assert prompt(folder, tools=(TOOL,)) == "[weather]<s><user>Hi</s><assistant>"


def test_templates_by_name_without_one_for_all(folder):
    say(folder, "tokenizer_config.json", chat_template=[{"name": "rag", "template": TEMPLATE}])
    with pytest.raises(
        UserError, match="chat template of chats does not take these messages.*multiple chat templates"
    ):
        prompt(folder)


def test_no_template_at_all(folder):
    with pytest.raises(UserError, match="chats was not made for chats: it has no chat template"):
        prompt(folder)


def test_a_template_that_refuses_the_system_role(folder):
    (folder / "chat_template.jinja").write_text(NO_SYSTEM)
    assert prompt(folder).endswith("<user>Hi</s><assistant>")
    with pytest.raises(UserError, match="does not take these messages: No system role here"):
        prompt(folder, ({"role": "system", "content": "Short"}, *TURNS))


def test_a_snapshot_of_the_hub_keeps_its_model_s_name(whole, tmp_path):
    """Its folder is named by a commit, so the node and the API would otherwise announce another model."""
    snapshot = tmp_path / "models--someone--Small-Chat" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(whole, snapshot)
    assert open_model(str(snapshot)).name == "Small-Chat"
    assert open_model(str(whole)).name == "chats"


# --- generation_config.json


def opened(folder: Path, **settings: Any) -> PreTrainedModel:
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return hollow_model(open_model(str(folder)), torch.nn.Identity())


def chosen(model: PreTrainedModel, logits: torch.Tensor, tokens: list[int], **asked: Any) -> int:
    """The next token of an answer of at most 8 to the prompt [1, 50], of which `tokens` are known."""
    choose = sampler(GenerationRequest(model="chats", prompt="", **asked), model, [1, 50], 8)
    return choose(torch.tensor([[1, 50, *tokens]]), logits.clone())


def row(**scores: float) -> torch.Tensor:
    found = torch.zeros(1, 100)
    for name, score in scores.items():
        found[0, int(name.removeprefix("t"))] = score
    return found


@pytest.mark.parametrize(
    "settings, tokens, scores, wanted",
    [
        ({"suppress_tokens": [40]}, [], {"t40": 9, "t41": 8}, 41),
        ({"begin_suppress_tokens": [40]}, [], {"t40": 9, "t41": 8}, 41),
        ({"begin_suppress_tokens": [40]}, [60], {"t40": 9, "t41": 8}, 40),
        ({"bad_words_ids": [[60, 40]]}, [60], {"t40": 9, "t41": 8}, 41),
        ({"bad_words_ids": [[60, 40]]}, [61], {"t40": 9, "t41": 8}, 40),
        ({"repetition_penalty": 2.0}, [40], {"t40": 9, "t41": 8}, 41),
        ({"no_repeat_ngram_size": 2}, [60, 40, 60], {"t40": 9, "t41": 8}, 41),
        ({"sequence_bias": [[[40], -5.0]]}, [], {"t40": 9, "t41": 8}, 41),
        ({"forced_eos_token_id": 2}, [5] * 7, {"t40": 9}, 2),
        ({"min_new_tokens": 3, "eos_token_id": [2, 9]}, [40], {"t2": 9, "t9": 8, "t41": 7}, 41),
        ({"min_new_tokens": 3, "eos_token_id": [2, 9]}, [40] * 3, {"t2": 9, "t9": 8, "t41": 7}, 2),
        ({"exponential_decay_length_penalty": [1, 50.0], "eos_token_id": 2}, [40] * 3, {"t2": 1, "t41": 7}, 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_chooses_the_next_token_holds(folder, settings, tokens, scores, wanted):
    assert chosen(opened(folder, **settings), row(**scores), tokens) == wanted


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"num_return_sequences": 2, "num_beams": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"cache_implementation": "static"},
        {"cache_implementation": "hybrid"},
        {"stop_strings": ["stop"]},
        {"token_healing": True},
        {"guidance_scale": 2.0},
        {"prompt_lookup_num_tokens": 3},
        {"dola_layers": "high"},
        {"max_time": 1.0},
    ],
    ids="-".join,
)
def test_what_asks_for_more_is_named_once_and_left_out(folder, settings, caplog):
    with caplog.at_level(logging.WARNING, "petals_win"):
        model = opened(folder, eos_token_id=2, **settings)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("petals_win")]
    named = {name: value for name, value in settings.items() if name != "top_k"}
    told = ", ".join(f"{name} {value}" for name, value in named.items())
    assert len(lines) == 1 and all(f"{name} {value}" in lines[0] for name, value in named.items()), told
    assert chosen(model, row(t40=9), []) == 40
    Language.of(open_model(str(folder)).tokenizer(), model)


def test_a_list_of_ends(folder):
    source = open_model(str(folder))
    assert Language.of(source.tokenizer(), opened(folder, eos_token_id=[2, 9, 11])).ends == {2, 9, 11}


@pytest.mark.parametrize("end", ["</s>", [[2]], 2.5, {"a": 1}])
def test_an_end_that_is_no_token(folder, end):
    source = open_model(str(folder))
    with pytest.raises(
        UserError, match="generation_config.json.*Correct what it says|generation_config.json .*is damaged"
    ):
        Language.of(source.tokenizer(), opened(folder, eos_token_id=end))


def test_an_end_beyond_the_vocabulary_is_named(folder, caplog):
    source = open_model(str(folder))
    with caplog.at_level(logging.WARNING, "petals_win"):
        Language.of(source.tokenizer(), opened(folder, eos_token_id=[2, 128_001]))
    assert "128001 is to end an answer, but the model has the tokens 0 to" in caplog.text


@pytest.mark.parametrize("settings", [{"sequence_bias": 3}, {"repetition_penalty": -1.0}, {"bad_words_ids": [5]}])
def test_settings_that_would_fail_in_every_answer_fail_at_the_start(folder, settings):
    model = opened(folder, **settings)
    with pytest.raises(
        UserError, match="generation_config.json cannot be followed: .*Correct what it says, or delete"
    ):
        Language.of(open_model(str(folder)).tokenizer(), model)


@pytest.mark.parametrize("data", ["{", "[]", "\ufffd"])
def test_settings_that_are_damaged(folder, data):
    (folder / "generation_config.json").write_text(data, encoding="utf-8")
    with pytest.raises(UserError, match="generation_config.json of chats is damaged"):
        hollow_model(open_model(str(folder)), torch.nn.Identity())


def test_no_settings(folder):
    (folder / "generation_config.json").unlink()
    model = hollow_model(open_model(str(folder)), torch.nn.Identity())
    assert isinstance(model.generation_config, GenerationConfig)
