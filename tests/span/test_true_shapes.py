"""What the plan says of the blocks of large models, in 16 bits and in int4, against what such a block takes of a process's memory.

A block of its true shape, of a mixture of experts with 8 of its 128, whose weights are zeros: how much memory they take does not depend on
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

QUANTS: tuple[Quant, ...] = ("none", "int4")
EXPERTS = 8
# By the model's name: what is changed of its configuration, and how many weights an expert has.
MODELS = {
    "meta-llama/Llama-3.3-70B-Instruct": ({"num_hidden_layers": 1}, 0),
    "Qwen/Qwen3-32B": ({"num_hidden_layers": 1}, 0),
    "openai/gpt-oss-120b": ({"num_hidden_layers": 1, "num_local_experts": EXPERTS}, 3 * 2880 * 2880),
    "zai-org/GLM-4.5-Air": (
        {"num_hidden_layers": 1, "n_routed_experts": EXPERTS, "first_k_dense_replace": 0},
        3 * 4096 * 1408,
    ),
}

# A tiny model comes first, so that what torch and the kernels take once is not counted. Blocks with experts come twice, and count the
# second time: torch keeps a buffer of an expert's size, which beside eight of them would not be small.
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

tiny, *folders = sys.argv[1:]
for quant in ("none", "int4"):
    load(tiny, quant)
measured = []
for folder in folders:
    for quant in ("none", "int4"):
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
    shape = {**known.shape, "tie_word_embeddings": False, "dtype": torch.bfloat16, "vocab_size": 64, **changes}
    return known.kind(**shape)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Quant, int]]:
    """Bytes by the model's name and by how its weights are kept."""
    tiny = tmp_path_factory.mktemp("tiny")
    small = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    write_checkpoint(tiny, config_of("meta-llama/Llama-2-7b-hf", num_hidden_layers=1, **small))
    folders = {name: tmp_path_factory.mktemp(f"model{number}") for number, name in enumerate(MODELS)}
    for name, (changes, _) in MODELS.items():
        write_checkpoint(folders[name], config_of(name, **changes))
    order = [*(name for name, (_, experts) in MODELS.items() if experts), *MODELS]
    command = [sys.executable, "-c", MEASURE, str(tiny), *(str(folders[name]) for name in order)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=280)
    assert done.returncode == 0, done.stderr
    values = iter(json.loads(done.stdout.splitlines()[-1]))
    return {name: {quant: next(values) for quant in QUANTS} for name in order}


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("name", MODELS)
def test_a_block_of_the_true_shape_takes_what_the_plan_says(name, quant, measured):
    changes, weights_of_an_expert = MODELS[name]
    planned = needs_of(config_of(name, **changes), torch.bfloat16, quant).block_bytes[0]
    assert measured[name][quant] == pytest.approx(planned, rel=0.05)
    whole = max(needs_of(config_of(name), torch.bfloat16, quant).block_bytes)
    if not weights_of_an_expert:
        assert whole == planned
        return
    bytes_of_a_weight = {"none": 2, "int4": 0.5 + 4 / 32}[quant]
    others = (128 - EXPERTS) * weights_of_an_expert * bytes_of_a_weight
    assert whole - planned == pytest.approx(others, rel=0.001), "and the rows of the router, and biases"
