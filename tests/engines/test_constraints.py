"""Answers that hold to a schema, an expression or a grammar: with the default model's tokenizer, and logits by chance."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
import torch
from tiny_chat import tiny_chat_model
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

from petals_win.bench.random_schemas import random_schemas
from petals_win.client.choosing import Sampler
from petals_win.engines.base import Constraint
from petals_win.engines.constraints import Constraints
from petals_win.engines.tokens import Language
from petals_win.errors import UserError
from petals_win.models.default_model import default_model_file
from petals_win.models.source import open_model

VOCABULARY = 49152
END = 2


@pytest.fixture(scope="module")
def constraints() -> Constraints:
    tokenizer = open_model(str(default_model_file())).tokenizer()
    return Constraints(Language(tokenizer, VOCABULARY, frozenset({END})))


@pytest.fixture(scope="module")
def chances(constraints: Constraints) -> list[torch.Tensor]:
    """Logits by chance [1, vocabulary], of a model that would like to come to an end."""
    tokenizer = constraints._language.tokenizer
    closing = [token for token in range(VOCABULARY) if not set(tokenizer.decode([token])) - set('"}],')]
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, VOCABULARY, generator=generator) * 2 for _ in range(7)]
    for logits in made:
        logits[0, closing] += 9
    return made


def guide(constraints: Constraints, kind: Any, text: str, prompt: Sequence[int] = ()) -> Any:
    return asyncio.run(constraints.guide(Constraint(kind, text), prompt))


def answer(constraints: Constraints, choose: Sampler, logits: Sequence[torch.Tensor], most: int = 400) -> str | None:
    """The text; None if it has not ended after so many tokens."""
    tokens: list[int] = []
    while len(tokens) < most:
        tokens.append(choose(torch.tensor([[1, *tokens]]), logits[len(tokens) % len(logits)]))
        if tokens[-1] == END:
            return constraints._language.tokenizer.decode(tokens[:-1])
    return None


def refusal(constraints: Constraints, kind: Any, text: Any) -> str:
    with pytest.raises(UserError) as refused:
        guide(constraints, kind, text if isinstance(text, str) else json.dumps(text))
    return str(refused.value)


def test_two_hundred_schemas_by_chance(constraints, chances):
    """Whatever a model would rather say, an answer that ends is valid, and what is refused is refused by name."""
    complete, refused, unfinished = 0, 0, 0
    for number, schema in enumerate(random_schemas(200, seed=14)):
        try:
            held = guide(constraints, "json_schema", json.dumps(schema))
        except UserError as e:
            refused += 1
            assert re.search("uniqueItems|not|contains", str(e)), f"{e} names no keyword of {schema}"
            continue
        generator = torch.Generator().manual_seed(number)
        text = answer(constraints, Sampler(LogitsProcessorList(), generator, held), chances[number % 5 :])
        if text is None:
            unfinished += 1
            continue
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        complete += 1
    assert 0 < refused <= 20 and unfinished <= 10 and complete + refused + unfinished == 200, (refused, unfinished)
