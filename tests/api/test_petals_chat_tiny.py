"""The chat of front-ends for Petals with a model that computes: portions, half characters, a session that goes on."""

from __future__ import annotations

import json

import httpx
import pytest
import websocket
from tiny_chat import tiny_chat_model

from api.serving import serving
from petals_win.engines.registry import EngineSettings, find_engine

TOKENS = 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny", context=512, ends=0)
    engine = find_engine("local")(EngineSettings(str(folder)))
    with serving(engine, "tiny") as served:
        yield served


def hear(chat: websocket.WebSocket) -> dict:
    heard = json.loads(chat.recv())
    assert heard["ok"], heard
    return heard


def test_portions_joined_are_the_text_as_a_whole(tiny):
    at_once = httpx.post(
        f"{tiny.url}/v1/completions",
        json={"model": "tiny", "prompt": "Hello", "max_tokens": TOKENS, "temperature": 0},
        timeout=60,
    ).json()["choices"][0]["text"]
    asked = {"type": "generate", "stop_sequence": "nowhere", "max_new_tokens": 1}
    begun = len(httpx.post(f"{tiny.url}/tokenize", json={"prompt": "Hello"}).json()["tokens"])
    chat = websocket.create_connection(f"ws://127.0.0.1:{tiny.port}/api/v2/generate", timeout=60)
    chat.send(json.dumps({"type": "open_inference_session", "model": "tiny", "max_length": 300}))
    hear(chat)
    # In two questions, the second of which goes on from where the first one has stopped.
    text, count = "", 0
    chat.send(json.dumps({"type": "generate", "inputs": "Hello", "max_new_tokens": TOKENS // 2}))
    first = hear(chat)
    chat.send(json.dumps({**asked, "max_length": begun + TOKENS}))
    text, count = first["outputs"], first["token_count"]
    while count < TOKENS:
        portion = hear(chat)
        text, count = text + portion["outputs"], count + portion["token_count"]
    assert (text, count) == (at_once, TOKENS)
    assert not json.loads(chat.recv())["ok"], "the length is used up, and the stop sequence has not come"
    chat.close()
