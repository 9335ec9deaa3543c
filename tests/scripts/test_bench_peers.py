"""scripts/bench-peers without llama.cpp: the file that both sides read, what is made of llama.cpp's lines, and its failures."""

from __future__ import annotations

import asyncio
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import psutil
import pytest
import torch
from gguf import GGUFReader, quants
from gguf.constants import GGMLQuantizationType
from models.gguf_writer import write_gguf

from petals_win.bench.figures import Rounds
from petals_win.errors import UserError
from petals_win.models.source import open_model

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_peers.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_peers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_peers"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_both_sides_read_the_model_without_quantization(script, checkpoint, home, tmp_path, dtype, expected):
    original = open_model(str(checkpoint("llama"))).whole_model()
    packed = write_gguf(original, tmp_path / "tiny.Q8_0.gguf")
    plain = script.plain_file(packed, dtype)
    assert plain.name == f"tiny-{dtype}.gguf"
    first, second = GGUFReader(packed), GGUFReader(plain)
    kept = {name for name in first.fields if name != "general.file_type"}
    assert kept <= second.fields.keys()
    assert all(first.fields[name].contents() == second.fields[name].contents() for name in kept)
    source = open_model(str(plain))
    assert source.name == "tiny" and source.dtype == expected
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted, found = original(input_ids=ids).logits, source.whole_model(torch.float32)(input_ids=ids).logits
    assert (found - wanted).abs().max() <= (1e-5 if dtype == "fp32" else 0.05) * wanted.abs().max()


def test_quantized_matrices_are_unpacked(script, checkpoint, home, tmp_path):
    """The values are those that the packed file stands for, not those that it was made of."""
    plain = write_gguf(open_model(str(checkpoint("llama"))).whole_model(), tmp_path / "plain.gguf")
    packed = tmp_path / "packed.gguf"
    q8 = GGMLQuantizationType.Q8_0
    script.unpack(plain, packed, q8, 7)
    assert q8 in {tensor.tensor_type for tensor in GGUFReader(packed).tensors}
    unpacked = {tensor.name: tensor.data for tensor in GGUFReader(script.plain_file(packed, "fp32")).tensors}
    for tensor in GGUFReader(packed).tensors:
        assert np.array_equal(unpacked[tensor.name], quants.dequantize(tensor.data, tensor.tensor_type))


def test_speeds_count_the_time_of_prompts(script):
    said = 'loading\n\n{"pl": 1, "tg": 32, "t_pp": 0.5, "t_tg": 1.5}\n{"pl": 8, "tg": 32, "t_pp": 1.0, "t_tg": 1.0}\n\nperf'
    assert script.speeds_of(said) == {1: 16.0, 8: 128.0}


def test_figures_by_their_names(script):
    rounds = Rounds()
    for name, by_round in {"ours": [10.0, 20.0, 40.0], "llama_rpc": [20.0, 20.0, 40.0]}.items():
        for value in by_round:
            for count in script.SESSIONS:
                rounds.add(f"{name}_{count}", count * value)
    assert script.figures(rounds) == {
        "ours_1": 20,
        "ours_8": 160,
        "ours_16": 320,
        "llama_rpc_1": 20,
        "llama_rpc_8": 160,
        "llama_rpc_16": 320,
        "ratio_1": 1,
        "ratio_8": 1,
        "ratio_16": 1,
    }


@pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp is measured on Linux and macOS")
def test_a_worker_that_does_not_start_and_a_client_that_fails_are_told(script, tmp_path):
    fails = tmp_path / "fails"
    fails.write_text("#!/bin/sh\necho no such file >&2\nexit 3\n")
    fails.chmod(0o700)
    programs = script.Programs(fails, fails)
    with pytest.raises(UserError, match="worker does not listen"), script.workers(programs):
        pass
    with pytest.raises(UserError, match="no such file"):
        script.ask_llama(programs, tmp_path / "model.gguf", ["127.0.0.1:1"], 7, 8)


@pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp is measured on Linux and macOS")
def test_a_build_that_fails_shows_its_last_lines(script, tmp_path):
    with pytest.raises(UserError, match="(?s)sh failed.*no compiler"):
        script.run(["sh", "-c", "echo no compiler; exit 1"], tmp_path / "build.log")


def test_the_launcher_names_the_script():
    launcher = SCRIPT.with_name("bench-peers").read_text("utf-8")
    assert f'bootstrap.py" {SCRIPT.stem} ' in launcher
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0 and "--dtype {fp32,bf16,q4_1}" in done.stdout


WORKER = """#!{python}
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("-p") + 1])))
while True:
    server.accept()[0].close()
"""
CLIENT = """#!{python}
import json, socket, sys
asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
for address in asked["--rpc"].split(","):
    host, port = address.split(":")
    socket.create_connection((host, int(port)), 5).close()
for count in asked["-npl"].split(","):
    print(json.dumps({{"pl": int(count), "tg": int(asked["-ntg"]), "t_pp": 0.5, "t_tg": 0.5}}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp is measured on Linux and macOS")
@pytest.mark.timeout(600)
def test_the_sides_take_turns(script, checkpoint, home, tmp_path):
    """With programs in the place of llama.cpp's, and our own swarm."""
    for name, program in (("worker", WORKER), ("client", CLIENT)):
        (tmp_path / name).write_text(program.format(python=sys.executable))
        (tmp_path / name).chmod(0o700)
    programs = script.Programs(tmp_path / "worker", tmp_path / "client")
    packed = write_gguf(open_model(str(checkpoint("llama"))).whole_model(), tmp_path / "tiny.gguf")
    before = psutil.Process().children()
    rounds = asyncio.run(script.measure(programs, script.plain_file(packed, "fp32"), 2, 4))
    assert psutil.Process().children() == before
    assert rounds.values.keys() == {f"{side}_{count}" for side in script.SIDES for count in script.SESSIONS}
    assert all(len(values) == 2 and min(values) > 0 for values in rounds.values.values())
    assert rounds.values["llama_rpc_8"] == [32.0, 32.0]
