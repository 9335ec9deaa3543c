"""What the chat template says against a conversation comes back as the caller's mistake, in every dialect."""

from __future__ import annotations

import json

import httpx
import pytest
from tiny_chat import TEMPLATE, tiny_chat_model

from api.serving import serving
from petals_win.engines.registry import EngineSettings, find_engine

REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role here') }}{% endif %}"
FAILS = "{% if messages[0].content == 'fail' %}{{ messages[0].nothing.at_all }}{% endif %}"
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    folder = tiny_chat_model(tmp_path_factory.mktemp("refusing") / "tiny", context=512, ends=0)
    (folder / "chat_template.jinja").write_text(REFUSES + FAILS + TEMPLATE)
    # As published models have it: a cache of transformers' own, which no swarm has.
    (folder / "generation_config.json").write_text(
        json.dumps({"cache_implementation": "hybrid", "eos_token_id": [2, 10]})
    )
    with serving(find_engine("local")(EngineSettings(str(folder))), "tiny") as served:
        yield served


def asked(served, path: str, messages: list[dict], **more) -> httpx.Response:
    body = {"model": "tiny", "messages": messages, "stream": False, **more}
    return httpx.post(f"{served.url}{path}", json=body, timeout=60)


@pytest.mark.parametrize(
    "path, more",
    [
        ("/v1/chat/completions", {"max_tokens": 3}),
        ("/api/chat", {"options": {"num_predict": 3}}),
        ("/v1/messages", {"max_tokens": 3}),
    ],
)
def test_a_system_role_that_the_template_refuses(refusing, path, more):
    assert asked(refusing, path, [USER], **more).status_code == 200
    if path == "/v1/messages":
        answer = asked(refusing, path, [USER], system="Short", **more)
    else:
        answer = asked(refusing, path, [{"role": "system", "content": "Short"}, USER], **more)
    assert answer.status_code == 400 and "No system role here" in answer.text


def test_a_template_that_fails(refusing):
    answer = asked(refusing, "/v1/chat/completions", [{"role": "user", "content": "fail"}], max_tokens=3)
    assert answer.status_code == 400 and "does not take these messages" in answer.text
