"""Texts as vectors: OpenAI's client, and Ollama's paths."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor, as_completed

import httpx
import openai
import pytest

from api.fake_engine import MODEL
from api.serving import eventually, serving
from petals_win.api.embedding import MAX_INPUTS
from petals_win.errors import UserError


def test_the_client_gets_the_same_vectors_in_both_encodings(served):
    create = served.client().embeddings.create
    texts = ["one two", "three"]
    by_default = create(model=MODEL, input=texts)  # the client asks for base64, and decodes it
    floats = create(model=MODEL, input=texts, encoding_format="float")
    assert [item.index for item in floats.data] == [0, 1]
    for one, other in zip(by_default.data, floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert math.hypot(*other.embedding) == pytest.approx(1)
    assert floats.data[0].embedding != floats.data[1].embedding
    assert (floats.model, floats.usage.prompt_tokens, floats.usage.total_tokens) == (MODEL, 3, 3)


def test_texts_and_token_ids(served):
    def vectors(given):
        answer = httpx.post(f"{served.url}/v1/embeddings", json={"model": "fake-model", "input": given})
        return [item["embedding"] for item in answer.json()["data"]]

    tokens = httpx.post(f"{served.url}/tokenize", json={"prompt": "one two"}).json()["tokens"]
    assert vectors("one two") == vectors(["one two"]) == vectors(tokens) == vectors([tokens])
    assert len(vectors([tokens, tokens[:1]])) == 2


def test_dimensions_are_the_models(served):
    create = served.client().embeddings.create
    assert len(create(model=MODEL, input="x", dimensions=3).data) == 1
    with pytest.raises(openai.BadRequestError, match="dimensions: .* vectors of 3 numbers"):
        create(model=MODEL, input="x", dimensions=256)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "a text, a list of texts"),
        ([[]], "empty"),
        (["x", 1], "a text, a list of texts"),
        ({"text": "x"}, "a text, a list of texts"),
        (["x"] * (MAX_INPUTS + 1), f"1 to {MAX_INPUTS} texts"),
        ("x " * 3000, "tokens"),
        ([-1], "list of token ids"),
        ([[1, True]], "list of token ids"),
        ([[2**31]], "list of token ids"),
        ([True], "list of token ids"),
        ("\ud800", "surrogate"),
    ],
)
def test_what_has_no_vector(served, given, said):
    body, headers = json.dumps({"model": MODEL, "input": given}), {"Content-Type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/embeddings", content=body, headers=headers)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_an_engine_that_cannot(served, monkeypatch):
    async def refuse(*_):
        raise UserError("This engine makes no embeddings.")

    monkeypatch.setattr(served.engine, "embed", refuse)
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        served.client().embeddings.create(model=MODEL, input="x")


def test_they_take_the_places_of_answers():
    with serving(max_running=1, max_waiting=1) as served, ThreadPoolExecutor(3) as pool:
        wait = {"model": MODEL, "input": "wait"}
        asked = [pool.submit(httpx.post, f"{served.url}/v1/embeddings", json=wait, timeout=60) for _ in range(3)]
        assert next(as_completed(asked)).result().status_code == 429
        assert eventually(lambda: served.engine.running == 1)
        served.api.stop()
        assert sorted(each.result().status_code for each in asked) == [429, 503, 503]
        assert served.engine.most_running == 1


def test_whoever_leaves_ends_the_work(served):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/embeddings", json={"model": MODEL, "input": "wait"}, timeout=3)
    assert eventually(lambda: served.engine.cancelled == 1 and served.engine.running == 0)


def test_shutting_down_ends_it():
    with serving() as served, ThreadPoolExecutor(1) as pool:
        ask = {"model": MODEL, "input": "wait"}
        waiting = pool.submit(httpx.post, f"{served.url}/v1/embeddings", json=ask, timeout=20)
        assert eventually(lambda: served.engine.running == 1)
        served.api.stop()
        assert waiting.result().status_code == 503
        assert waiting.result().json()["error"]["code"] == "shutting_down"


def test_ollamas_paths(served):
    one = httpx.post(f"{served.url}/api/embed", json={"model": "fake-model:latest", "input": "one two"}).json()
    assert one["model"] == "fake-model:latest" and one["prompt_eval_count"] == 2 and one["total_duration"] > 0
    two = httpx.post(f"{served.url}/api/embed", json={"model": MODEL, "input": ["one two", "three"]}).json()
    assert two["embeddings"][0] == one["embeddings"][0] and len(two["embeddings"]) == 2
    old = httpx.post(f"{served.url}/api/embeddings", json={"model": MODEL, "prompt": "one two"}).json()
    assert old == {"embedding": one["embeddings"][0]}


def test_what_is_too_long_for_ollamas_is_cut_off(served):
    long = {"model": MODEL, "input": "x " * 3000}
    answer = httpx.post(f"{served.url}/api/embed", json=long)
    assert answer.json()["prompt_eval_count"] == served.engine.context_length
    assert httpx.post(f"{served.url}/api/embed", json={**long, "truncate": False}).status_code == 400
