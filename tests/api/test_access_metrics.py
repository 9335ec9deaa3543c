"""GET /metrics: what is counted for answers of each kind, and that the dashboard shows what there is."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Any

import httpx
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from api.fake_engine import MODEL, FakeEngine
from api.serving import Served, eventually, serving
from petals_win.api.created_keys import CreatedKeys


def values(served: Served) -> dict[str, float]:
    """Each sample's value; the name has its labels in braces, but for the model's."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            if sample.labels.get("model_name", MODEL) == MODEL:
                found[sample.name + (json.dumps(labels, sort_keys=True) if labels else "")] = sample.value
    return found


def ask(served: Served, text: str, **fields: Any) -> int:
    return httpx.post(f"{served.url}/v1/chat/completions", json=served.chat(text, **fields), timeout=20).status_code


def test_answers_are_counted():
    with serving(FakeEngine(pace=0.02)) as served:
        assert ask(served, "count 5") == 200
        assert ask(served, "count 9", max_tokens=3, stream=True) == 200
        assert ask(served, "recall 1 b c", n=2) == 200
        found = values(served)
    assert found["vllm:prompt_tokens_total"] == found["vllm:prefix_cache_queries_total"] == 2 + 2 + 2 * 4
    assert found["vllm:generation_tokens_total"] == 5 + 3 + 2 * 6
    assert found["vllm:prefix_cache_hits_total"] == 2
    assert found['vllm:request_success_total{"finished_reason": "stop"}'] == 3
    assert found['vllm:request_success_total{"finished_reason": "length"}'] == 1
    assert found["vllm:e2e_request_latency_seconds_count"] == found["vllm:time_to_first_token_seconds_count"] == 4
    assert found["vllm:request_queue_time_seconds_count"] == 3, "the second of two has no line to wait in"
    assert found["vllm:inter_token_latency_seconds_count"] == 4 + 2 + 2 * 5
    assert found["vllm:request_time_per_output_token_seconds_count"] == 4
    mean = found["vllm:request_time_per_output_token_seconds_sum"] / 4
    assert 0.019 < mean < 0.5
    assert found["vllm:e2e_request_latency_seconds_sum"] > 20 * 0.02
    assert found["vllm:time_to_first_token_seconds_sum"] < found["vllm:e2e_request_latency_seconds_sum"]


def test_requests_that_run_and_wait_are_shown():
    with serving(FakeEngine(pace=0.02), max_running=1) as served, ThreadPoolExecutor(1) as pool:
        url, body = f"{served.url}/v1/chat/completions", served.chat("count 1000", stream=True)
        with httpx.stream("POST", url, json=body) as first:
            lines = first.iter_lines()
            assert next(lines)
            waits = pool.submit(ask, served, "say x")
            assert eventually(lambda: values(served)["vllm:num_requests_waiting"] == 1)
            assert values(served)["vllm:num_requests_running"] == 1
        assert waits.result() == 200
        found = values(served)
        assert found["vllm:num_requests_waiting"] == found["vllm:num_requests_running"] == 0
        assert found['vllm:request_success_total{"finished_reason": "abort"}'] == 1
        assert found['vllm:request_success_total{"finished_reason": "stop"}'] == 1
        assert found["vllm:generation_tokens_total"] >= 2, "what was written before it was given up counts"
        assert found["vllm:prompt_tokens_total"] == 2, "that of the other one"


def test_what_breaks_and_what_is_refused(tmp_path):
    keys = CreatedKeys(tmp_path)
    key = {"Authorization": f"Bearer {keys.create('limited', requests_per_minute=3)}"}
    with serving(created_keys=keys) as served:
        body = [served.chat(text) for text in ("break", "missing", "crash", "say x")]
        url = f"{served.url}/v1/chat/completions"
        assert [httpx.post(url, json=each, headers=key, timeout=60).status_code for each in body] == [
            503,
            503,
            500,
            429,
        ]
        assert httpx.get(f"{served.url}/metrics").status_code == 401
        text = httpx.get(f"{served.url}/metrics", headers=key).text
        model = f'model_name="{MODEL}"'
        assert f'petals_win_requests_failed_total{{{model},status="503"}} 2.0' in text
        assert f'petals_win_requests_failed_total{{{model},status="500"}} 1.0' in text
        assert 'petals_win_requests_refused_total{reason="key"} 1.0' in text


def test_the_swarms_state():
    with serving(FakeEngine(missing_blocks=tuple(range(15, 30)))) as served:
        found = values(served)
    assert (found["petals_win_ready"], found["petals_win_peers"]) == (0, 1)
    assert (found["petals_win_blocks"], found["petals_win_blocks_missing"]) == (30, 15)
    peer = '{"name": "gaming-pc", "peer_id": "12D3KooWFakePeer"}'
    assert found[f"petals_win_peer_throughput{peer}"] == 123.5
    assert found[f"petals_win_peer_cache_tokens_left{peer}"] == 4096
    assert found[f"petals_win_peer_relayed{peer}"] == 0


def test_both_forms_can_be_read(served):
    ask(served, "say x")
    plain = httpx.get(f"{served.url}/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=")
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    newer = httpx.get(f"{served.url}/metrics", headers=accept)
    assert newer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in openmetrics.text_string_to_metric_families(newer.text)}
    assert "vllm:time_to_first_token_seconds" in names


def test_the_dashboard_shows_what_there_is(served):
    """Each metric that it asks for is one that is sent, so that no panel stays empty."""
    ask(served, "count 3")
    dashboard = json.loads(files("petals_win.api").joinpath("grafana.json").read_text("utf-8"))
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ()))
    named = set(re.findall(r"\b(?:vllm:|petals_win_)\w+", asked))
    assert len(named) > 10
    sent = {
        sample.name
        for family in text_string_to_metric_families(httpx.get(f"{served.url}/metrics").text)
        for sample in family.samples
    }
    # Counted by reasons that this server has not met yet, or known to other engines.
    documented = set(re.findall(r"^# TYPE (\S+)", httpx.get(f"{served.url}/metrics").text, re.MULTILINE))
    assert named <= sent | documented
