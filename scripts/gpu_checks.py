"""The checks of gpu-check, one function each: what the product computes on a device against what transformers does on the CPU.

Run by gpu_check.py as: gpu_checks.py DEVICE MODEL FOLDER NAME…; prints events as lines of JSON. Knows torch, spans and swarms. Does
not know deadlines. No run on a GPU is known yet.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import platform
import re
import statistics
import sys
import threading
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
BLOCKS, VOCABULARY, CONTEXT = 4, 512, 2048
WINDOW, PROMPT, DECODED = 8, 21, 6  # the prompt reaches past the windows
QUESTION = "What is the capital of France?"

# Grouped heads, none, sliding windows, a mixture of experts.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 512},
    "gpt_neox": {"intermediate_size": 512},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "intermediate_size": 512,
        "head_dim": 64,
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
    },
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2},
}
# How weights are kept and computed: dtype, quantization.
STORAGES: dict[str, tuple[torch.dtype, Any]] = {
    "float32": (torch.float32, "none"),
    "bfloat16": (torch.bfloat16, "none"),
    "float16": (torch.float16, "none"),
    "nf4": (torch.bfloat16, "nf4"),
    "int8": (torch.bfloat16, "int8"),
    "int4": (torch.bfloat16, "int4"),
}
# The largest error of a logit over the largest logit. TF32, which is off, would be off by 1e-3.
EXACT = 1e-4
# In fewer bits: the error of all logits together (root mean square, over that of the logits) may be this many times what the same
# weights give on the CPU, and a little; but never more than the last figure.
TIMES, AND, AT_MOST = 1.5, 0.01, {"bfloat16": 0.1, "float16": 0.05, "nf4": 0.6, "int8": 0.3, "int4": 0.6}


@dataclass(frozen=True)
class Result:
    """One line of the table. Figures are what was measured, and under "why" a reason."""

    level: Literal["ok", "failed", "skipped"]
    what: str
    figures: dict[str, Any] = field(default_factory=dict)


class Skipped(Exception):
    """Why something cannot be checked here."""


@dataclass(frozen=True)
class Asked:
    """The device to check, a model of the user's or "", and an empty folder."""

    device: torch.device
    model: str
    folder: Path

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


Check = Callable[[Asked], Iterator[Result]]


def check_device(asked: Asked) -> Iterator[Result]:
    """What there is: the card, its driver, the versions of what computes."""
    versions = {"torch": torch.__version__, **{name: _version(name) for name in ("transformers", "bitsandbytes")}}
    figures: dict[str, Any] = {"python": platform.python_version(), **versions, "system": platform.system()}
    if missing := _missing():
        figures["missing"] = ", ".join(missing)
    if not asked.is_cuda:
        yield Result("ok", "device", {"device": platform.processor() or platform.machine(), **figures})
        needs_cuda = "logits on the card", "memory on the card", "tokens/s on the card"
        for what in needs_cuda:
            yield Result("skipped", what, {"why": f"needs CUDA, and this is --device {asked.device}"})
        return
    from petals_win.host.gpu import GpuError, find_nvidia

    try:
        driver = find_nvidia()
        figures["driver"] = (
            f"{driver.version} for CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver else "no nvidia-smi"
        )
    except GpuError as e:
        figures["driver"] = str(e)
    if not torch.cuda.is_available():
        why = f"this torch finds no GPU (built for CUDA {torch.version.cuda}); --device cpu runs the half without one"
        yield Result("failed", "device", {"why": why, **figures})
        return
    free, total = torch.cuda.mem_get_info(asked.device)
    (torch.ones(64, 64, device=asked.device) @ torch.ones(64, 64, device=asked.device)).sum().item()
    figures["capability"] = ".".join(map(str, torch.cuda.get_device_capability(asked.device)))
    figures |= {"cuda": torch.version.cuda, "free MiB": free // MIB, "of": total // MIB}
    yield Result("ok", "device", {"device": torch.cuda.get_device_name(asked.device), **figures})


def check_families(asked: Asked) -> Iterator[Result]:
    """Random models of four families: logits of a prefill and of steps with a cache, in all storages.

    On a CPU, for the time, in all storages for the first family, in 32 and 16 bits for the others.
    """
    for family in FAMILIES:
        storages = list(STORAGES) if asked.is_cuda or family == "llama" else ["float32", "bfloat16"]
        folder = _make_model(asked.folder / family, family)
        tokens = torch.randint(3, VOCABULARY, (1, PROMPT + DECODED), generator=torch.Generator().manual_seed(1))
        yield from _logits(asked, family, str(folder), tokens, storages)


def check_smollm2(asked: Asked) -> Iterator[Result]:
    """The default model's logits in all storages."""
    if not asked.is_cuda and not asked.model:
        raise Skipped(
            "takes long on a CPU, where tests/e2e compares it; give its file by --model to do it all the same"
        )
    model = _smollm2(asked)
    from petals_win.models.source import open_model

    source = open_model(model)
    text = "The capital of France is Paris, and the capital of Italy is the old city of Rome, where"
    tokens = source.tokenizer()(text, return_tensors="pt")["input_ids"]
    yield from _logits(asked, "SmolLM2", model, tokens, list(STORAGES))


def check_memory(asked: Asked) -> Iterator[Result]:
    """What a span and its sessions take on the device, against what `plan` and a node's start reckon with."""
    from petals_win.models.source import open_model
    from petals_win.span.needs import needs_of
    from petals_win.span.span import Span

    folder = _make_model(asked.folder / "memory", "llama", **(_LARGE if asked.is_cuda else {}))
    source = open_model(str(folder))
    for storage in ("bfloat16", "nf4", "int8", "int4"):
        dtype, quant = STORAGES[storage]
        if why := _why_not(quant, asked.device):
            yield Result("skipped", f"memory, {storage}", {"why": why})
            continue
        needs = needs_of(source.config, dtype, quant, source.in_four_bits)
        tokens = needs.cache_tokens
        before = _allocated(asked)
        _reset_peak(asked)
        span = Span.load(source, 0, source.num_blocks, dtype=dtype, device=asked.device, quant=quant)
        weights = _allocated(asked) - before if asked.is_cuda else span.weight_bytes
        session = span.open(1, tokens)
        cache = _allocated(asked) - before - weights if asked.is_cuda else span.session_bytes(1, tokens)
        wanted, wanted_cache = sum(needs.block_bytes), needs.cache_bytes * source.num_blocks
        figures = {
            "weights MiB": _mib(weights),
            "planned": _mib(wanted),
            "caches MiB": _mib(cache),
            "planned caches": _mib(wanted_cache),
            **({"peak MiB": _mib(torch.cuda.max_memory_allocated(asked.device) - before)} if asked.is_cuda else {}),
        }
        right = _as_planned(weights, wanted) and _as_planned(cache, wanted_cache)
        yield Result("ok" if right else "failed", f"memory, {storage}", figures)
        session.close()
        del span, session
        _collect(asked)


def _as_planned(taken: int, planned: int) -> bool:
    """Torch rounds up what it allocates, for each tensor, to 512 bytes."""
    return 0.95 * planned <= taken <= 1.05 * planned + MIB


def check_too_large(asked: Asked) -> Iterator[Result]:
    """A session that does not fit into the device is refused by torch, nothing of it stays, and the next one computes."""
    from petals_win.models.source import open_model
    from petals_win.span.span import Span

    span = Span.load(open_model(str(_make_model(asked.folder / "room", "llama"))), 0, BLOCKS, device=asked.device)
    hidden = torch.randn(1, PROMPT, span.row.width, generator=torch.Generator().manual_seed(2))

    def compute() -> torch.Tensor:
        session = span.open(1, 2 * PROMPT)
        output = span.step(session, hidden).cpu()
        session.close()
        return output

    expected, before = compute(), _allocated(asked)
    room = 2 * torch.cuda.mem_get_info(asked.device)[1] if asked.is_cuda else 2**60
    try:
        span.open(1, room // span.cache_bytes_per_token)
    except RuntimeError as e:  # torch.OutOfMemoryError is one
        said = str(e).strip().splitlines()[0][:100]
    else:
        yield Result("failed", "a session too large", {"why": f"{room // MIB} MiB were given away"})
        return
    _collect(asked)
    same, left = torch.equal(compute(), expected), _allocated(asked) - before
    right = same and left <= 0
    figures = {"refused": said, "next one": "the same" if same else "differs", "left MiB": _mib(left)}
    yield Result("ok" if right else "failed", "a session too large", figures)


def check_swarm(asked: Asked) -> Iterator[Result]:
    """Two nodes on one device: an answer by the API, speed, and memory on the card."""
    from petals_win.models.source import open_model
    from petals_win.span.needs import needs_of
    from petals_win.swarm.local import LocalSwarm
    from petals_win.swarm.planner import TAKEN_OF_GPU

    model, about = _swarm_model(asked)
    source = open_model(model)
    half = source.num_blocks // 2
    spans = [f"0:{half}", f"{half}:{source.num_blocks}"]
    options = ["--device", str(asked.device), "--dtype", "float32", "--quant", "none"]
    if not asked.is_cuda:
        options += ["--threads", "1"]
    free = _free(asked)
    began = time.perf_counter()
    with LocalSwarm(model, spans, options=options, on_line=lambda *line: print(*line, file=sys.stderr)) as swarm:
        swarm.wait_until_serving()
        started = time.perf_counter() - began
        yield Result("ok", f"two nodes, {about}", {"start s": round(started, 1)})
        if asked.is_cuda:
            taken = (free - _free(asked)) / 2
            needs = needs_of(source.config, torch.float32)
            weights = sum(needs.block_bytes) / 2
            right = weights <= taken <= weights + half * needs.cache_bytes + TAKEN_OF_GPU
            figures = {"MiB": _mib(taken), "weights MiB": _mib(weights), "over them": _mib(taken - weights)}
            yield Result("ok" if right else "failed", "memory of a node on the card", figures)
        local = source.whole_model(torch.float32).to(asked.device)
        with _api(model, swarm.peers) as (url, name):
            yield _answers(asked, source, local, url, name)
            yield _speed(asked, local, model, swarm.peers)


CHECKS: dict[str, Check] = {
    "device": check_device,
    "families": check_families,
    "smollm2": check_smollm2,
    "memory": check_memory,
    "too_large": check_too_large,
    "swarm": check_swarm,
}


# -- logits


class _Blocks(nn.Module):
    """A span in the place of a model's layers: with a session while there is one, without a cache else."""

    def __init__(self, span: Any):
        super().__init__()
        self.span, self.session = span, None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        span = self.span
        stepped = span.step(self.session, hidden) if self.session else span.forward(hidden, span.start, span.end)
        return stepped.to("cpu", torch.float32)


def _logits(asked: Asked, name: str, model: str, tokens: torch.Tensor, storages: list[str]) -> Iterator[Result]:
    """Compare logits [1, tokens, vocabulary] with those of transformers in float32 on the CPU."""
    from petals_win.client.hollow import hollow_model
    from petals_win.models.source import open_model

    source = open_model(model)
    with torch.inference_mode():
        expected = source.whole_model(torch.float32)(tokens, use_cache=False).logits
    blocks = _Blocks(None)
    hollow = hollow_model(source, blocks, dtype=torch.float32)
    for storage in storages:
        if why := _why_not(STORAGES[storage][1], asked.device):
            yield Result("skipped", f"{name}, {storage}", {"why": why})
            continue
        began = time.perf_counter()
        logits, whole = _run(source, hollow, blocks, tokens, storage, asked.device)
        seconds = {"s": round(time.perf_counter() - began, 2)}
        if storage == "float32":
            error = max(_largest(logits, expected), _largest(whole, expected))
            figures = {"error": f"{error:.1e}", "allowed": f"{EXACT:.0e}", **seconds}
            yield Result("ok" if error <= EXACT else "failed", f"{name}, {storage}", figures)
            continue
        error = max(_mean(logits, expected), _mean(whole, expected))
        allowed, figures = AT_MOST[storage], {}
        if asked.is_cuda:
            on_cpu = max(
                _mean(it, expected) for it in _run(source, hollow, blocks, tokens, storage, torch.device("cpu"))
            )
            allowed, figures = min(allowed, TIMES * on_cpu + AND), {"on the CPU": f"{on_cpu:.1e}"}
        figures = {"error": f"{error:.1e}", **figures, "allowed": f"{allowed:.1e}", **seconds}
        yield Result("ok" if error <= allowed else "failed", f"{name}, {storage}", figures)


@torch.inference_mode()
def _run(
    source: Any, hollow: nn.Module, blocks: _Blocks, tokens: torch.Tensor, storage: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by a prefill and steps with a cache, and those of one pass without."""
    from petals_win.span.span import Span

    dtype, quant = STORAGES[storage]
    blocks.span = Span.load(source, 0, source.num_blocks, dtype=dtype, device=device, quant=quant)
    try:
        blocks.session = blocks.span.open(1, tokens.shape[1])
        pieces = tokens[:, :-DECODED], *tokens[:, -DECODED:].split(1, dim=1)
        stepped = torch.cat([hollow(piece, use_cache=False).logits for piece in pieces], dim=1)
        blocks.session = None
        return stepped, hollow(tokens, use_cache=False).logits
    finally:
        blocks.span = blocks.session = None


def _largest(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _mean(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# -- models

_LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4}
# SmolLM2's shapes, for speed where its file is not there.
_LIKE_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def _make_model(folder: Path, family: str, **changes: Any) -> Path:
    """A folder with a random model, always the same one, and a tokenizer of as many words as it has tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 8,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**common, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # the default spread is so small that every token looks alike
                parameter.mul_(3)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", unk_token="w3")
    tokenizer.chat_template = "{% for message in messages %}w10 {{ message['content'] }} w11 w12{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def _smollm2(asked: Asked) -> str:
    """Raises Skipped where it is not: nothing is fetched here."""
    from petals_win.models.default_model import default_model_path

    path = Path(asked.model) if asked.model else default_model_path()
    if not path.exists():
        raise Skipped(f"SmolLM2 is not in petals-win's cache ({path}); give its file by --model")
    return str(path)


def _swarm_model(asked: Asked) -> tuple[str, str]:
    if not asked.is_cuda:
        return str(_make_model(asked.folder / "swarm", "llama")), "a small random model"
    try:
        return _smollm2(asked), "SmolLM2"
    except Skipped:
        return str(_make_model(asked.folder / "swarm", "llama", **_LIKE_SMOLLM2)), "a random model of SmolLM2's shapes"


# -- the swarm


@contextlib.contextmanager
def _api(model: str, peers: list[str]) -> Iterator[tuple[str, str]]:
    """The API in front of the swarm, on a thread of its own: its address, and the model's name there."""
    import asyncio

    from petals_win.api.app import create_app
    from petals_win.api.server import ApiServer
    from petals_win.api.settings import Settings
    from petals_win.engines.petals import PetalsEngine
    from petals_win.engines.text import TextEngine

    settings = Settings(port=0)
    server = ApiServer(settings)
    engine = TextEngine(PetalsEngine.connect(model, peers))
    ready = threading.Event()

    async def serve() -> None:
        await engine.start(lambda why: print(why, file=sys.stderr))
        await server.serve(create_app(engine, settings=settings), ready.set)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="API", daemon=True)
    thread.start()
    try:
        if not ready.wait(60):
            raise TimeoutError("the API did not get ready within 60 s")
        yield server.url, engine.models()[0].id
    finally:
        server.stop()
        thread.join(20)


def _answers(asked: Asked, source: Any, local: Any, url: str, name: str) -> Result:
    """The same question to the swarm, by HTTP, and to transformers in this process, on the same device."""
    import urllib.request

    messages, limit = [{"role": "user", "content": QUESTION}], 24
    body = json.dumps({"model": name, "messages": messages, "max_tokens": limit, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business with loopback
    with direct.open(request, timeout=60) as response:
        answer = json.load(response)["choices"][0]["message"]["content"]
    tokenizer = source.tokenizer()
    prompt = torch.tensor([tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)])
    expected_ids = _greedy(local, prompt.to(asked.device), max_new_tokens=limit)[0, prompt.shape[1] :]
    expected = tokenizer.decode(expected_ids.tolist(), skip_special_tokens=True)
    same = answer.strip() == expected.strip()
    figures = {"text": "that of one process" if same else f"{answer!r} is not {expected!r}", "words": answer[:60]}
    return Result("ok" if same else "failed", "an answer by the API", figures)


def _speed(asked: Asked, local: Any, model: str, peers: list[str]) -> Result:
    """Tokens/s, in turns; a figure, not a judgement."""
    tokens, rounds = (64, 5) if asked.is_cuda else (8, 2)
    prompt = torch.arange(5, 5 + PROMPT).unsqueeze(0)
    with _client(model, peers) as remote:

        def timed(generate: Any, device: torch.device | str) -> float:
            _synchronize(asked)
            began = time.perf_counter()
            generate(prompt.to(device), max_new_tokens=tokens, min_new_tokens=tokens)
            _synchronize(asked)
            return tokens / (time.perf_counter() - began)

        sides = [
            (lambda *a, **k: _greedy(local, *a, **k), asked.device),
            (lambda *a, **k: _greedy(remote, *a, **k), "cpu"),
        ]
        for side in sides:
            timed(*side)  # warm up
        alone, swarm = zip(*[[timed(*side) for side in sides] for _ in range(rounds)], strict=True)
    figures = {"alone": round(statistics.median(alone), 1), "swarm": round(statistics.median(swarm), 1)}
    figures["ratio"] = round(figures["swarm"] / figures["alone"], 2)
    return Result("ok", f"tokens/s, float32, {asked.device.type}", figures)


@contextlib.contextmanager
def _client(model: str, peers: list[str], **settings: Any) -> Iterator[Any]:
    from petals.utils.auto_config import AutoDistributedModelForCausalLM

    remote: Any = AutoDistributedModelForCausalLM.from_pretrained(
        model, initial_peers=peers, show_route=False, **settings
    )
    try:
        yield remote.eval()
    finally:
        remote.blocks.sequence_manager.shutdown()
        remote.blocks.sequence_manager.dht.shutdown()


def _greedy(model: Any, prompt: torch.Tensor, **limits: int) -> torch.Tensor:
    with torch.inference_mode():
        return model.generate(prompt, do_sample=False, **limits)


# -- devices


def _synchronize(asked: Asked) -> None:
    if asked.is_cuda:
        torch.cuda.synchronize(asked.device)


def _allocated(asked: Asked) -> int:
    """Bytes that this process has on the card; 0 on a CPU, where nobody counts them."""
    _synchronize(asked)
    return torch.cuda.memory_allocated(asked.device) if asked.is_cuda else 0


def _free(asked: Asked) -> int:
    return torch.cuda.mem_get_info(asked.device)[0] if asked.is_cuda else 0


def _reset_peak(asked: Asked) -> None:
    if asked.is_cuda:
        torch.cuda.reset_peak_memory_stats(asked.device)


def _collect(asked: Asked) -> None:
    gc.collect()
    if asked.is_cuda:
        torch.cuda.empty_cache()


def _mib(size: float) -> float:
    return round(size / MIB, 1)


def _version(package: str) -> str:
    """Of an installed package; 0 where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _missing() -> list[str]:
    """What pyproject.toml wants of other packages and is not here, in the version wanted."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = map(Requirement, project["dependencies"])
    return [str(need) for need in wanted if not need.specifier.contains(_version(need.name), prereleases=True)]


def _why_not(quant: str, device: Any) -> str:
    """Why weights cannot be kept so on `device`, or ""."""
    from petals_win.span import int4

    if quant == "int4":
        return int4.why_not(torch.device(device))
    if quant == "none":
        return ""
    try:
        import bitsandbytes  # noqa: F401
    except Exception as e:  # it loads a library that was made for one CUDA, and fails in many ways
        return f"bitsandbytes: {(str(e).strip() or type(e).__name__).splitlines()[0]}"
    return ""


# -- running


def _carry_out(name: str, asked: Asked) -> Iterator[Result]:
    """The results of one check; what it raises is a result, too."""
    try:
        yield from CHECKS[name](asked)
    except Skipped as e:
        yield Result("skipped", name, {"why": str(e)})
    except ModuleNotFoundError as e:
        traceback.print_exc()
        ours = (e.name or "").partition(".")[0] in ("petals_win", "petals", "hivemind", "transformers", "torch")
        why = f"{e.name} is not installed"
        if ours:
            why += f": transformers {_version('transformers')} may not be the one in pyproject.toml, or external/ is not built"
        yield Result("failed" if ours else "skipped", name, {"why": why})
    except Exception as e:
        traceback.print_exc()
        yield Result("failed", name, {"why": f"{type(e).__name__}: {(str(e).strip() or '-').splitlines()[0][:300]}"})


def main(device: str, model: str, folder: str, *names: str) -> int:
    if device == "cpu":
        torch.set_num_threads(1)  # small models gain nothing by more, and other programs may want them
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in names:
        _emit("begin", name=name)
        failed = False
        for result in _carry_out(name, Asked(torch.device(device), model, Path(folder))):
            failed = failed or result.level == "failed"
            _emit("result", level=result.level, what=result.what, figures=result.figures, check=name)
        # After an error a card may go on failing: the next check gets a process of its own.
        over = failed and device != "cpu"
        _emit("end", name=name, over=over)
        if over:
            return 1
    return 0


def _emit(event: str, **facts: Any) -> None:
    print(re.sub(r"\bNaN\b|\bInfinity\b", "null", json.dumps({"event": event, **facts})), flush=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
