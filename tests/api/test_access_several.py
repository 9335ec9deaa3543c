"""Several engines behind one API: what is shown of them, loading on demand, and Ollama's keep_alive."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.fake_engine import FakeEngine
from api.serving import Served, eventually, serving
from petals_win.engines import member, several
from petals_win.engines.base import ModelCard, SwarmStatus
from petals_win.engines.offers import Offer
from petals_win.engines.several import SeveralEngines
from petals_win.errors import UserError


class Alone(FakeEngine):
    """One that computes without a swarm."""

    def status(self) -> SwarmStatus:
        return SwarmStatus(True, "All 2 blocks are on this PC.", num_blocks=2, cache_usage=0.25)


class Models:
    """Two models that are loaded when asked for, and a swarm that is there. loads: how often; load: what they wait for."""

    def __init__(self) -> None:
        self.loads = {"a": 0, "b": 0}
        self.load = threading.Event()
        self.load.set()
        self.failing: Exception | None = None
        self.swarm = FakeEngine(model="swarm")

    def engine(self, keep_alive: float = math.inf) -> SeveralEngines:
        swarm = Offer("petals", tuple(self.swarm.models()), lambda: self.swarm)
        return SeveralEngines([self._offer("a"), self._offer("b"), swarm], keep_alive, [None, None, self.swarm])

    def _offer(self, name: str) -> Offer:
        def load() -> FakeEngine:
            self.loads[name] += 1
            assert self.load.wait(20)
            if self.failing is not None:
                raise self.failing
            return Alone(model=name)

        return Offer("local", (ModelCard(name, 1_700_000_000, 4000),), load, True)


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    for module in (member, several):
        monkeypatch.setattr(module, "LINGER_S", 0.05)


def get(served: Served, path: str) -> dict:
    return httpx.get(served.url + path, timeout=20).json()


def post(served: Served, path: str, **body) -> httpx.Response:
    return httpx.post(served.url + path, json=body, timeout=30)


def states(served: Served) -> dict[str, str]:
    return {each["models"][0]: each["state"] for each in get(served, "/ready")["engines"]}


def test_what_is_shown():
    models = Models()
    with serving(models.engine(), model="a") as served:
        assert [each["id"] for each in get(served, "/v1/models")["data"]] == ["a", "b", "swarm"]
        assert [each["name"] for each in get(served, "/api/tags")["models"]] == [
            "a:latest",
            "b:latest",
            "swarm:latest",
        ]
        assert states(served) == {"a": "unloaded", "b": "unloaded", "swarm": "loaded"}
        assert (
            served.client().chat.completions.create(**served.chat("say hello")).choices[0].message.content == "hello"
        )
        state = get(served, "/v1/swarm")
        assert (state["model"], state["num_blocks"], state["ready"]) == ("swarm", 30, True)
        assert [(each["engine"], each["state"], each["ready"]) for each in state["engines"]] == [
            ("local", "loaded", True),
            ("local", "unloaded", True),
            ("petals", "loaded", True),
        ]
        assert state["engines"][1]["detail"] == "b is loaded when somebody asks for it."
        assert [peer["name"] for peer in state["engines"][2]["peers"]] == ["gaming-pc"]
        assert [each["name"] for each in get(served, "/api/ps")["models"]] == ["a:latest", "swarm:latest"]
        metrics = {
            (sample.name, sample.labels.get("model_name")): sample.value
            for family in text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)
            for sample in family.samples
        }
        assert [metrics["petals_win_loaded", name] for name in ("a", "b", "swarm")] == [1, 0, 1]
        assert [metrics["petals_win_blocks", name] for name in ("a", "b", "swarm")] == [2, 0, 30]
        assert metrics["vllm:num_requests_running", "b"] == 0
        assert metrics["vllm:kv_cache_usage_perc", "a"] == 0.25
        assert metrics["vllm:generation_tokens_total", "a"] == 1
        with pytest.raises(openai.NotFoundError, match="Ask for one of: a, b, swarm"):
            served.client().chat.completions.create(**replace(served, model="c").chat("hello"))


def test_everything_goes_by_name():
    models = Models()
    with serving(models.engine(), model="a") as served:
        tokens = post(served, "/tokenize", model="b", prompt="some words").json()["tokens"]
        assert post(served, "/detokenize", model="b", tokens=tokens).json()["prompt"] == "some words"
        assert models.loads == {"a": 0, "b": 1}
        assert post(served, "/v1/embeddings", model="a", input="words").json()["model"] == "a"
        assert post(served, "/v1/completions", model="swarm", prompt="say yes").json()["choices"][0]["text"] == "yes"
        assert models.loads == {"a": 1, "b": 1} and len(models.swarm.requests) == 1


def test_aliases_are_of_the_first():
    with serving(Models().engine(), model="gpt-4o", aliases=("gpt-4o",), any_model=True) as served:
        assert served.client().chat.completions.create(**served.chat("say x")).model == "a"
        with pytest.raises(openai.NotFoundError):
            served.client().chat.completions.create(**replace(served, model="whatever").chat("say x"))


def test_who_waits_for_a_load_waits_without_a_place():
    """Eight questions to a model that is being loaded, where two are answered at a time: others go on, and it is loaded once."""
    models = Models()
    models.load.clear()
    with serving(models.engine(), model="a", max_running=2) as served, ThreadPoolExecutor(8) as asking:
        asked = [asking.submit(post, served, "/v1/chat/completions", **served.chat(f"say {n}")) for n in range(8)]
        assert eventually(lambda: get(served, "/ready")["engines"][0]["waiting"] == 8)
        assert states(served)["a"] == "loading" and models.loads["a"] == 1
        waiting = 'vllm:num_requests_waiting{model_name="a"} 8.0'
        assert waiting in httpx.get(f"{served.url}/metrics").text
        assert post(served, "/v1/completions", model="swarm", prompt="say yes").status_code == 200
        models.load.set()
        told = [each.result().json()["choices"][0]["message"]["content"] for each in asked]
        assert told == [str(n) for n in range(8)] and models.loads == {"a": 1, "b": 0}


def test_a_client_that_leaves_while_its_model_is_loaded():
    models = Models()
    models.load.clear()
    with serving(models.engine(), model="a") as served:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/chat/completions", json=served.chat("say x"), timeout=3)
        assert eventually(lambda: get(served, "/ready")["engines"][0]["waiting"] == 0)
        models.load.set()
        assert eventually(lambda: states(served)["a"] == "loaded")
        assert post(served, "/v1/chat/completions", **served.chat("say x")).status_code == 200
        assert models.loads["a"] == 1


def test_a_load_that_fails():
    models = Models()
    models.failing = UserError("The file is damaged.")
    with serving(models.engine(), model="a") as served:
        response = post(served, "/v1/chat/completions", **served.chat("say x"))
        assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
        error = response.json()["error"]
        assert (error["message"], error["code"]) == (
            "a could not be loaded: The file is damaged.",
            "swarm_unavailable",
        )
        assert states(served)["a"] == "failed" and get(served, "/ready")["ready"]


def test_the_server_ends_while_a_model_is_loaded():
    models = Models()
    models.load.clear()
    with ThreadPoolExecutor(1) as asking:
        with serving(models.engine(), model="a") as served:
            asked = asking.submit(post, served, "/v1/chat/completions", **served.chat("say x"))
            assert eventually(lambda: models.loads["a"] == 1)
        assert asked.result().status_code == 503
    models.load.set()


def test_ollama_says_how_long_a_model_is_kept():
    models = Models()
    with serving(models.engine(keep_alive=3600), model="a") as served:
        reply = post(served, "/api/generate", model="a").json()
        assert reply["done_reason"] == "load" and models.loads["a"] == 1

        def left(model: str) -> float:
            [found] = [each for each in get(served, "/api/ps")["models"] if each["name"] == f"{model}:latest"]
            return (datetime.fromisoformat(found["expires_at"]) - datetime.now(UTC)).total_seconds()

        assert 3500 < left("a") <= 3600 and left("swarm") > 10**9
        post(
            served,
            "/api/chat",
            model="a",
            messages=[{"role": "user", "content": "say x"}],
            stream=False,
            keep_alive="5m",
        )
        assert 200 < left("a") <= 300
        post(served, "/api/generate", model="b", prompt="say x", stream=False, keep_alive=-1)
        assert left("b") > 10**9
        assert post(served, "/api/generate", model="b", keep_alive=0).json()["done_reason"] == "unload"
        assert eventually(lambda: states(served)["b"] == "unloaded")
        assert post(served, "/api/generate", model="b", keep_alive=0).json()["done_reason"] == "unload"
        assert models.loads == {"a": 1, "b": 1}, "what is to go is not loaded for it"
        refused = post(served, "/api/generate", model="a", keep_alive="soon")
        assert refused.status_code == 400 and "keep_alive" in refused.json()["error"]
