"""scripts/chats in short: a small model, a few chats, and a prompt up to the end of its context whose nodes are killed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "chats.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scripts_chats", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(400)
def test_chats_are_answered_and_a_long_prompt_survives_its_nodes():
    command = [sys.executable, SCRIPT, "--json", "--models", "2048", "--at-once", "4", "--in-a-row", "20"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=380)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["missed"] == [], done.stderr
    chats = found["2048"]
    assert chats["at_once"]["to_the_end_of_the_context"] == 4 and chats["at_once"]["tokens"] > 4 * 1900
    assert chats["in_a_row"]["answered"] == 20 and len(chats["in_a_row"]["growth"]) == 3
    prompt = chats["prompt"]
    assert (prompt["tokens"], prompt["answer_tokens"]) == (2000, 48)
    assert prompt["killed_in"] == ["prefill", "decode"] and prompt["right"]
    assert len(prompt["nodes"]) == 4 and all(node["planned_mib"] > 0 for node in prompt["nodes"])


KEPT: dict[str, Any] = {
    "context": 4096,
    "offered_context": 4096,
    "at_once": {"asked": 16, "answered": 16, "first_wrong": ""},
    "in_a_row": {"asked": 200, "answered": 200, "first_wrong": "", "growth": {"api": 1.03}},
    "nodes": [{"blocks": "0:2", "announced_mib": 3000, "most_mib": 800, "grown_mib": 5, "planned_mib": 9}],
    "prompt": {"right": True, "killed_in": ["prefill", "decode"], "nodes": []},
}


@pytest.mark.parametrize(
    ("part", "changes", "sentence"),
    [
        ("", {"offered_context": 4000}, "room for 4,000 tokens"),
        ("at_once", {"answered": 15, "first_wrong": "status 503: full"}, "15 of 16 were answered.*503: full"),
        ("in_a_row", {"answered": 199}, "199 of 200"),
        ("in_a_row", {"growth": {"api": 1.031}}, "memory of api grew to 1.031"),
        ("nodes", {"most_mib": 3300}, "took 3300 MiB, having announced 3000"),
        ("nodes", {"grown_mib": 266}, "grew by 266 MiB, with 9 planned"),
        ("prompt", {"right": False}, "another one than that of transformers"),
        ("prompt", {"killed_in": ["decode"]}, "no node was killed in prefill"),
    ],
)
def test_what_is_missed_is_said(script, part, changes, sentence):
    assert list(script.missed(KEPT)) == []
    found = KEPT | changes if not part else {**KEPT, part: _changed(KEPT[part], changes)}
    (said,) = script.missed(found)
    assert re.search(sentence, said), said


def _changed(figures: Any, changes: dict[str, Any]) -> Any:
    return [_changed(each, changes) for each in figures] if isinstance(figures, list) else figures | changes


def test_a_text_may_part_from_the_right_one_only_where_that_is_undecided(script):
    right = script.Right([5, 6, 7], [1.0, 1e-5, 1.0])
    assert right.parts_from([5, 6, 7]) is None
    assert right.parts_from([5, 8, 1]) == 1e-5
    assert right.parts_from([4, 6, 7]) == 1.0
    assert right.parts_from([5, 6]) == 1.0 and right.parts_from([5, 6, 7, 8]) == float("inf")
