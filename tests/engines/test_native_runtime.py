"""A native runtime over a real model (runtimes/llama.c) in both dialects: it says what transformers says, and keeps the contract."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from native_runtime import build_runtime, write_model
from test_contract import OfPrograms
from tiny_chat import tiny_chat_model
from transformers import AutoModelForCausalLM, AutoTokenizer

CONTEXT = 2048  # so that a whole answer takes longer than a test waits before it leaves


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny", context=CONTEXT, ends=0)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """Built from its present source, or PETALS_WIN_TESTED_RUNTIME."""
    if chosen := os.environ.get("PETALS_WIN_TESTED_RUNTIME"):
        return Path(chosen)
    return build_runtime(tmp_path_factory.mktemp("runtime"))


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory) -> Path:
    return write_model(folder, tmp_path_factory.mktemp("model") / "tiny.bin")


def test_greedy_answers_are_those_of_transformers(folder, program, file):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in ("The history of", "x", "<s><user>count 5000</s><assistant>", "Ünknown letters are left out. " * 10):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=60,
            do_sample=False,
            suppress_tokens=list(range(5)),
        )
        command = [program, file, "-n", "60", "--temp", "0"]
        done = subprocess.run(command, input=prompt.encode(), capture_output=True, timeout=60, check=True)
        assert done.stdout.decode() == tokenizer.decode(expected[0, ids.shape[1] :])


@pytest.fixture
def described(program, file, tmp_path):
    """Writes descriptions of the runtime, whose model is `tiny`."""

    def write(head: str, more: str) -> str:
        path = tmp_path / "runtime.toml"
        path.write_text(f"program = {json.dumps(str(program))}\n{head}\n[[models]]\nname = 'tiny'\n{more}", "utf-8")
        return str(path)

    return write


class TestLinesOfJson(OfPrograms):
    lacks = frozenset({"tools", "logprobs", "token ids", "embeddings"})

    @pytest.fixture(autouse=True)
    def _prepared(self, described, file):
        self.path = described(f"arguments = [{json.dumps(str(file))}, '--jsonl']", "")


class TestForEachQuestion(OfPrograms):
    lacks = frozenset({"tools", "logprobs", "token ids", "embeddings", "counts along"})

    @pytest.fixture(autouse=True)
    def _prepared(self, described, file, folder):
        head = (
            "dialect = 'cli'\narguments = ['{file}']\n[options]\nmax_tokens = ['-n', '{max_tokens}']\n"
            "temperature = ['--temp', '{temperature}']\nseed = ['--seed', '{seed}']\n[limits]\nat_once = 4"
        )
        more = f"context_length = {CONTEXT}\ntokenizer = {json.dumps(str(folder))}\nsettings = {{ file = {json.dumps(str(file))} }}"
        self.path = described(head, more)
