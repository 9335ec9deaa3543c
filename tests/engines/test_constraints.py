"""Answers that hold to a schema, an expression or a grammar: with the default model's tokenizer, and logits by chance."""

from __future__ import annotations

import asyncio
import json
import random
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
    torch.set_num_threads(1)
    tokenizer = constraints._language.tokenizer
    closing = [token for token in range(VOCABULARY) if not set(tokenizer.decode([token])) - set('"}],')]
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, VOCABULARY, generator=generator) for _ in range(31)]
    for logits in made:
        logits[0, closing] += 6
    return made


def guide(constraints: Constraints, kind: Any, text: str, prompt: Sequence[int] = ()) -> Any:
    return asyncio.run(constraints.guide(Constraint(kind, text), prompt))


def answer(
    constraints: Constraints, choose: Sampler, chances: Sequence[torch.Tensor], seed: int, most: int = 400
) -> str:
    """The text; it has to end before so many tokens."""
    tokens, chance = list[int](), random.Random(seed)
    while len(tokens) < most:
        token = choose(torch.tensor([[1, *tokens]]), chance.choice(chances))
        if token == END:
            return constraints._language.tokenizer.decode(tokens)
        tokens.append(token)
    raise TimeoutError(f"an answer that does not end: {constraints._language.tokenizer.decode(tokens)}")


def refusal(constraints: Constraints, kind: Any, text: Any) -> str:
    with pytest.raises(UserError) as refused:
        guide(constraints, kind, text if isinstance(text, str) else json.dumps(text))
    return str(refused.value)


def test_two_hundred_schemas_by_chance(constraints, chances):
    """Whatever a model would rather say, an answer that ends is valid, and what is refused is refused by name."""
    refused, unfinished = 0, 0
    for number, schema in enumerate(random_schemas(200, seed=14)):
        try:
            held = guide(constraints, "json_schema", json.dumps(schema))
        except UserError as e:
            refused += 1
            assert re.search("uniqueItems|not|contains", str(e)), f"{e} names no keyword of {schema}"
            continue
        try:
            text = answer(constraints, Sampler(LogitsProcessorList(), guide=held), chances, number)
        except TimeoutError:
            unfinished += 1
            continue
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert 0 < refused <= 20 and unfinished <= 10


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        (
            {"properties": {"a": {"type": "array", "uniqueItems": True}}},
            "uniqueItems cannot be held to here. Leave it out.",
        ),
        ({"if": {}, "not": {}}, "if, not cannot be held to here"),
        ({"oneOf": [{"type": "string"}, {"type": "string"}]}, "oneOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "in a pattern, look-around"),
        ({"type": "text"}, "type: text"),
        ({"$ref": "https://example.org/x"}, "$ref: Resource 'https://example.org/x'"),
        ({"$ref": "#/$defs/a"}, "$ref: Pointer"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum (3) is greater than maximum (2)"),
        ({"allOf": [{"$ref": "#"}]}, "nothing fits it"),
        ("[1]", "a JSON schema is an object"),
        ("{", "line 1 column 2"),
    ],
)
def test_what_cannot_be_held_to_is_named(constraints, schema, reason):
    assert reason in refusal(constraints, "json_schema", schema)


def chain(length: int) -> dict[str, Any]:
    """Definitions of which each refers to the next."""
    links = {f"a{n}": {"properties": {"x": {"$ref": f"#/$defs/a{n + 1}"}}} for n in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": {**links, f"a{length}": {}}}


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", json.dumps({"enum": ["x" * 2**17]}), "characters, and 131072 are the most"),
        ("json_schema", '{"items":' * 100 + "{}" + "}" * 100, "more than 60 lists and objects"),
        ("json_schema", "[" * 100_000, "too much stands within each other"),
        ("json_schema", json.dumps(chain(1500)), "levels, and 2000 are the most"),
        ("grammar", "start: %json " + json.dumps(chain(1500)), "levels, and 2000 are the most"),
        ("grammar", "start: a0\n" + "\n".join(f"a{n}: a{n + 1}" for n in range(3000)), "it has 3001 rules"),
        ("grammar", "start: " + "(" * 50_000, "nested"),
        ("grammar", "root ::= " + "(" * 50_000, "too much stands within each other"),
        ("grammar", "start: nothing", "nothing"),
        ("regex", "(" * 50_000, "cannot be used"),
        ("regex", "(?=a)", "look-around"),
    ],
)
def test_what_would_take_the_process_down(constraints, kind, text, reason):
    """Many of these overflow the stack, which no exception tells."""
    assert reason in refusal(constraints, kind, text)


def test_as_deep_as_is_allowed(constraints):
    held = guide(constraints, "json_schema", json.dumps(chain(600)))
    for token in constraints._language.tokenizer.encode('{"x": {"x"', add_special_tokens=False):
        assert not held.forbidden()[token]
        held.took(token)


def test_what_turns_out_to_be_too_much_ends_the_answer(constraints):
    """Each token of it costs more than the one before."""
    held = guide(
        constraints, "json_schema", json.dumps({"properties": {f"p{n}": {"maxLength": n} for n in range(2500)}})
    )
    held.took(constraints._language.tokenizer.encode('{"')[0])
    with pytest.raises(UserError, match="The JSON schema cannot be used: .*2000"):
        held.forbidden()


@pytest.mark.parametrize(
    ("kind", "text", "fits"),
    [
        ("regex", "[ab]{3}-\\d{2}", "[ab]{3}-\\d{2}"),
        ("grammar", 'root ::= "yes" | "no" ("," digit){2}\ndigit ::= [0-9]', "yes|no(,[0-9]){2}"),
        ("grammar", 'start: word (" " word)~2\nword: /[a-z]{1,5}/', "[a-z]{1,5}( [a-z]{1,5}){2}"),
        ("grammar", "start: " + json.dumps('größer "x"\n\\'), re.escape('größer "x"\n\\')),
    ],
)
def test_expressions_and_grammars(constraints, chances, kind, text, fits):
    for seed in range(3):
        held = guide(constraints, kind, text)
        assert re.fullmatch(fits, answer(constraints, Sampler(LogitsProcessorList(), guide=held), chances, seed))


def test_an_answer_is_held_to_it_after_the_thoughts_that_its_prompt_begins(constraints):
    tokenizer = constraints._language.tokenizer
    opened = tokenizer.encode("Why?\nassistant\n<think>\n", add_special_tokens=False)
    held = guide(constraints, "regex", "ab", opened)
    for token in tokenizer.encode("Let me see {[</think>", add_special_tokens=False):
        assert held.forbidden() is None
        held.took(token)
    (allowed,) = (held.forbidden() == False).nonzero().T.tolist()  # noqa: E712
    assert {tokenizer.decode([token]) for token in allowed} == {"ab"}
    assert guide(constraints, "regex", "ab", tokenizer.encode("<think></think>")).forbidden() is not None


class _Unwilling(LogitsProcessor):
    """Keeps a single token, as settings of a model may."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(scores, float("-inf"))
        only[:, 5] = 0
        return only


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_what_a_model_forbids_gives_way(constraints, chances, generator):
    held = guide(constraints, "regex", "a{3}")
    choose = Sampler(LogitsProcessorList([_Unwilling()]), generator, guide=held)
    assert not choose.takes_the_likeliest
    assert answer(constraints, choose, chances, 0) == "aaa"


def test_an_unusual_tokenizer(tmp_path):
    """One token for each character; what no token ends cannot be held."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model(tmp_path / "tiny", context=64))
    tiny = Constraints(Language(tokenizer, 103, frozenset({2})))
    held, said = guide(tiny, "json_schema", json.dumps({"const": {"a": [1]}})), list[int]()
    while said[-1:] != [2]:
        said.append(int(held.forbidden().int().argmin()))
        held.took(said[-1])
    assert json.loads(tokenizer.decode(said[:-1])) == {"a": [1]}
    assert "no token that ends" in refusal(Constraints(Language(tokenizer, 103, frozenset())), "regex", "a")
