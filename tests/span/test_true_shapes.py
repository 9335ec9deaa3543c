"""What the plan says of the blocks of large models, in 16 bits and in int4, against what such a block takes of a process's memory.

A block of its true shape, of a mixture of experts with 4 of its 128, whose weights are zeros: how much memory they take does not depend on
them. With all of its experts a block takes that much more for each, which is arithmetic.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from true_shapes import write_checkpoint

from petals_win.span.needs import needs_of
from petals_win.span.quantized_linear import Quant
from petals_win.swarm.known_models import find_known_model

EXPERTS = 4
# By the model's name: what is changed of its configuration, and how many weights an expert has.
MODELS = {
    "meta-llama/Llama-3.3-70B-Instruct": ({}, 0),
    "Qwen/Qwen3-32B": ({}, 0),
    "openai/gpt-oss-120b": ({"num_local_experts": EXPERTS}, 3 * 2880 * 2880),
    "zai-org/GLM-4.5-Air": (
        {"n_routed_experts": EXPERTS, "num_experts_per_tok": EXPERTS, "first_k_dense_replace": 0},
        3 * 4096 * 1408,
    ),
}
# torch keeps a buffer of an expert's size, which beside so few of them would not be small: such blocks are loaded once before.
BEFORE: list[tuple[str, Quant]] = [(name, "none") for name, (_, experts) in MODELS.items() if experts]
KINDS: tuple[Quant, ...] = ("none", "int4")
LOADED: list[tuple[str, Quant]] = [(name, quant) for quant in KINDS for name in MODELS]

# A tiny model comes first, so that what torch and the kernels take once is not counted.
MEASURE = """
import json, sys
import torch
from petals_win.host.memory import give_back_memory, own_bytes
from petals_win.models.source import open_model
from petals_win.span import layouts
from petals_win.span.span import Span

torch.set_num_threads(1)
# Else layouts are tried out with weights of their own, whose memory Windows gives back when it likes.
layouts.fastest_layout = lambda *_: "by rows"

def load(folder, quant):
    span = Span.load(open_model(folder), 0, 1, dtype=torch.bfloat16, quant=quant)
    span.step(span.open(1, 8), torch.zeros(1, 4, span.row.width, dtype=span.dtype))
    return span

measured = []
for folder, quant in json.loads(sys.argv[1]):
    give_back_memory()
    before = own_bytes()
    span = load(folder, quant)
    give_back_memory()
    measured.append(own_bytes() - before)
    del span
print(json.dumps(measured))
"""


def config_of(name: str, **changes: object):
    known = find_known_model(name)
    assert known is not None
    shape = {**known.shape, "tie_word_embeddings": False, "dtype": torch.bfloat16, "vocab_size": 64}
    shape |= {"num_hidden_layers": 1, **changes}
    return known.kind(**shape)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Quant], int]:
    """Bytes by the model's name and by how its weights are kept."""
    tiny = tmp_path_factory.mktemp("tiny")
    small = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_checkpoint(tiny, config_of("meta-llama/Llama-2-7b-hf", **small))
    folders = {name: tmp_path_factory.mktemp(f"model{number}") for number, name in enumerate(MODELS)}
    for name, (changes, _) in MODELS.items():
        write_checkpoint(folders[name], config_of(name, **changes))
    to_load = [(str(folders[name]), quant) for name, quant in [*BEFORE, *LOADED]]
    asked = json.dumps([(str(tiny), "none"), (str(tiny), "int4"), *to_load])
    done = subprocess.run([sys.executable, "-c", MEASURE, asked], capture_output=True, encoding="utf-8", timeout=560)
    assert done.returncode == 0, done.stderr
    return dict(zip(LOADED, json.loads(done.stdout.splitlines()[-1])[-len(LOADED) :], strict=True))


@pytest.mark.timeout(600)  # the first one loads for all
@pytest.mark.parametrize(("name", "quant"), LOADED)
def test_a_block_of_the_true_shape_takes_what_the_plan_says(name, quant, measured):
    changes, _ = MODELS[name]
    planned = needs_of(config_of(name, **changes), torch.bfloat16, quant).block_bytes[0]
    assert measured[name, quant] == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("quant", ["none", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_block_with_all_of_its_experts_takes_that_much_more(name, quant):
    changes, weights_of_an_expert = MODELS[name]
    planned = needs_of(config_of(name, **changes), torch.bfloat16, quant).block_bytes[0]
    known = find_known_model(name)
    assert known is not None
    whole = max(needs_of(known.config(), torch.bfloat16, quant).block_bytes)
    others = (128 - EXPERTS) * weights_of_an_expert * {"none": 2, "int4": 0.5 + 4 / 32}[quant]
    # Beside them are only rows of the router, and biases.
    assert whole - planned == pytest.approx(others, rel=0.002)
