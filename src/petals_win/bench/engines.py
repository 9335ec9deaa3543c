"""Engines side by side in one run: tokens per second of 1, 8 and 16 questions for each that this PC has.

Knows how engines are opened, and the order of the rounds. Does not know what they compute with.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from petals_win.bench.figures import Rounds
from petals_win.engines.base import Engine, GenerationRequest, Usage
from petals_win.engines.registry import EngineSettings, find_engine
from petals_win.errors import UserError
from petals_win.host.folders import cache_folder
from petals_win.host.locks import hold_lock
from petals_win.models.source import DEFAULT_MODEL, open_model
from petals_win.swarm.local import LocalSwarm

PRECISIONS = ("int4", "fp32")  # of "onnx"
_REST_S = 0.3  # between two sides: what has just computed may still wait awake for more
_ANSWERS_S = 3600.0
_START_S = 600.0
_CONVERT_S = 4 * 3600.0
_ROOM = 1024  # tokens of an answer of llama-server

Report = Callable[[str], None]
Opened = AbstractAsyncContextManager[Engine]


@dataclass(frozen=True)
class EnginesReport:
    """Tokens per second of all questions together, by engine and number of questions such as "local_8": medians, and every round.

    left_out: engines that were not measured, and why.
    """

    model: str
    rounds: int
    tokens: int
    engines: tuple[str, ...]
    sessions: tuple[int, ...]
    left_out: dict[str, str]
    values: dict[str, list[float]]
    medians: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        about = {
            name: getattr(self, name) for name in ("model", "rounds", "tokens", "engines", "sessions", "left_out")
        }
        every = {name: [round(value, 2) for value in values] for name, values in self.values.items()}
        return {**about, **{f"{name}_tokens_per_s": value for name, value in self.medians.items()}, "all": every}


def run_engines_bench(
    model: str,
    *,
    rounds: int = 5,
    tokens: int = 32,
    sessions: Sequence[int] = (1, 8, 16),
    llama_server: Path | None = None,
    report: Report = lambda _line: None,
) -> EnginesReport:
    """Measure "local", "onnx_int4", "onnx_fp32", "petals" (two nodes on this PC) and, if its program is given, "llama_server".

    "local" and "petals" are as users get them; of a model that is stored in few bits there are "local_unquantized" and "petals_unquantized", too.
    All of them are loaded at once and take turns within a round. The models for onnx are converted once and kept in the cache folder.
    An engine whose package is missing, or that does not take the model, is left out. Raises UserError if the model cannot be opened.
    """
    return asyncio.run(_measure(model, rounds, tokens, tuple(sorted(set(sessions))), llama_server, report))


async def _measure(
    model: str, rounds: int, tokens: int, sessions: tuple[int, ...], llama_server: Path | None, report: Report
) -> EnginesReport:
    source = open_model(model)
    name = source.name
    ways = {"": None, "_unquantized": "none"} if source.in_few_bits else {"": None}
    sides: dict[str, Callable[[], Opened]] = {
        f"local{way}": lambda quant=quant: _local(model, quant) for way, quant in ways.items()
    }
    for precision in PRECISIONS:
        sides[f"onnx_{precision}"] = lambda precision=precision: _onnx(model, name, precision, report)
    sides |= {f"petals{way}": lambda quant=quant: _two_nodes(model, quant) for way, quant in ways.items()}
    if llama_server is not None:
        sides["llama_server"] = lambda: _llama_server(model, llama_server)
    found, left_out = Rounds(), dict[str, str]()
    async with AsyncExitStack() as stack:
        engines: dict[str, Engine] = {}
        for side, opened in sides.items():
            report(f"opening {side}")
            try:
                engine = await stack.enter_async_context(opened())
                await tokens_per_s(engine, 1, tokens, 0)  # what only the first answer pays for
                engines[side] = engine
            except UserError as error:
                left_out[side] = str(error)
                report(f"{side} is left out: {error}")
        for number in range(1, rounds + 1):
            report(f"round {number} of {rounds}")
            for count in sessions:
                for side, engine in engines.items():
                    speed = await tokens_per_s(engine, count, tokens, number)
                    found.add(f"{side}_{count}", speed)
                    report(f"    {side}_{count} {speed:.1f} tokens/s")
                    await asyncio.sleep(_REST_S)
    medians = {key: found.median(key) for key in found.values}
    return EnginesReport(name, rounds, tokens, tuple(engines), sessions, left_out, found.values, medians)


async def tokens_per_s(engine: Engine, questions: int, tokens: int, number: int) -> float:
    """Of so many questions at once together, prompts included; those of each number are new."""
    model = engine.models()[0].id

    async def ask(which: int) -> int:
        prompt = f"{number} and {which} are two numbers. The history of computing began with"
        request = GenerationRequest(model=model, prompt=prompt, max_tokens=tokens, ignore_eos=True, temperature=0.0)
        async with aclosing(engine.generate(request)) as events:
            return sum([event.completion_tokens async for event in events if isinstance(event, Usage)])

    began = time.perf_counter()
    async with asyncio.timeout(_ANSWERS_S):
        counts = await asyncio.gather(*map(ask, range(questions)))
    if set(counts) != {tokens}:
        raise UserError(f"Answers of {tokens} tokens were asked for, and {sorted(set(counts))} came.")
    return questions * tokens / (time.perf_counter() - began)


@asynccontextmanager
async def _started(engine: Engine) -> AsyncGenerator[Engine, None]:
    try:
        await engine.start(lambda _why: None)  # whoever asks is told by an error
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def _local(model: str, quant: str | None) -> AsyncGenerator[Engine, None]:
    settings = EngineSettings(model, quant=quant)
    async with _started(await asyncio.to_thread(find_engine("local"), settings)) as engine:
        yield engine


@asynccontextmanager
async def _onnx(model: str, name: str, precision: str, report: Report) -> AsyncGenerator[Engine, None]:
    folder = await asyncio.to_thread(_converted, model, name, precision, report)
    async with _started(await asyncio.to_thread(find_engine("onnx"), EngineSettings(str(folder)))) as engine:
        yield engine


def _converted(model: str, name: str, precision: str, report: Report) -> Path:
    """The folder for ONNX Runtime, made at the first call, and again if the model's content is another one."""
    from petals_win.models.onnx_conversion import convert_to_onnx

    content = hashlib.sha256(open_model(model).swarm_name.encode()).hexdigest()[:16]
    place = cache_folder() / "bench" / "onnx"
    place.mkdir(parents=True, exist_ok=True)
    folder = place / f"{name}-{precision}-{content}"
    with hold_lock(place / "lock", f"the conversion of {name}", timeout=_CONVERT_S):
        if not folder.exists():
            report(f"converting {name} for ONNX Runtime in {precision}")
            convert_to_onnx(model, folder, precision=precision, device="cpu")
    return folder


@asynccontextmanager
async def _two_nodes(model: str, quant: str | None) -> AsyncGenerator[Engine, None]:
    blocks = open_model(model).num_blocks
    half, options = blocks // 2, [] if quant is None else ["--quant", quant]
    with LocalSwarm(model, [f"0:{half}", f"{half}:{blocks}"], options=options) as swarm:
        await asyncio.to_thread(swarm.wait_until_serving)
        settings = EngineSettings(model, tuple(swarm.peers))
        async with _started(await asyncio.to_thread(find_engine("petals"), settings)) as engine:
            yield engine


@asynccontextmanager
async def _llama_server(model: str, program: Path) -> AsyncGenerator[Engine, None]:
    """llama.cpp's server over the model's own GGUF file, asked by the engine "openai"."""
    file, port, places = _gguf_file(model), _free_port(), 16
    command = [str(program), "-m", str(file), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--parallel", str(places), "--ctx-size", str(places * _ROOM)]
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        except OSError as e:
            raise UserError(f"{program} cannot be started: {e.strerror or e}.") from e
        try:
            await _wait_for(f"http://127.0.0.1:{port}/health", process, program)
            settings = EngineSettings("", base_url=f"http://127.0.0.1:{port}/v1")
            async with _started(await asyncio.to_thread(find_engine("openai"), settings)) as engine:
                yield engine
        finally:
            process.kill()
            await asyncio.to_thread(process.wait)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _gguf_file(model: str) -> Path:
    """Raises UserError for a model that is no GGUF file."""
    if model == DEFAULT_MODEL:
        from petals_win.models.default_model import default_model_file

        return default_model_file()
    if not model.lower().endswith(".gguf") or not os.path.isfile(model):
        raise UserError("llama-server takes GGUF files only: measure it with one as --model.")
    return Path(model)


async def _wait_for(url: str, process: subprocess.Popen[Any], program: Path) -> None:
    """Until it answers. Raises UserError if it ends, or does not in time."""
    deadline = time.monotonic() + _START_S
    async with httpx.AsyncClient(trust_env=False) as http:
        while True:
            with suppress(httpx.HTTPError):
                if (await http.get(url)).status_code == 200:
                    return
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"{program} does not answer. Run it by itself to see what it says.")
            await asyncio.sleep(0.2)
