"""`petals-win bench` in short, on a small random model, and what surrounds its measurements."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace

import psutil
import pytest
from tiny_chat import tiny_chat_model
from typer.testing import CliRunner

from petals_win.bench import asking, swarm
from petals_win.bench.asking import Asker
from petals_win.bench.busy import awake_cores, busy_program
from petals_win.bench.one_process import OneProcess
from petals_win.cli.main import app
from petals_win.engines.base import Finished, ModelCard, SwarmFull, Token, Usage
from petals_win.errors import UserError

FIGURES = {
    "local_tokens_per_s",
    "swarm_tokens_per_s",
    "ratio",
    "ratio_busy",
    "sessions_2_tokens_per_s",
    "sessions_2_over_1",
    "sessions_2_over_batch",
    "sessions_2_busy_over_idle",
    "local_batch_2_tokens_per_s",
    "prefill_s",
    "prefill_ratio",
    "prefill_disturbance",
    "cached_prefill_speedup",
}


@pytest.mark.timeout(600)
def test_everything_is_measured_in_one_run(tmp_path):
    model = tiny_chat_model(tmp_path / "tiny", context=2048)
    lines: list[str] = []
    before = psutil.Process().children()
    report = swarm.run_bench(str(model), rounds=2, tokens=6, sessions=(2,), prompt=200, report=lines.append)
    found = json.loads(json.dumps(report.as_dict()))
    assert found.keys() >= FIGURES and all(found[name] > 0 for name in FIGURES)
    assert found["model"] == "tiny" and found["prompt"] == 200 and found["start_seconds"] > 0
    assert found["node_overhead_bytes"] > 0 and found["weights_bytes"] > 0 and 0 <= found["swarm_won"] <= 2
    assert all(len(values) == 2 for values in found["all"].values())
    assert len([line for line in lines if line.startswith("round ")]) == 2
    assert not any("differ" in line for line in lines)  # both sides have generated the same text
    assert psutil.Process().children() == before


def report_of(**changes) -> swarm.BenchReport:
    return swarm.BenchReport(
        **{
            "model": "M",
            "rounds": 5,
            "tokens": 8,
            "prompt": 0,
            "figures": {"ratio": 1.25, "sessions_2_over_1": 1.75},
            "values": {"local_tokens_per_s": [1.23456, 2.0]},
            "swarm_won": 4,
            "start_seconds": 3.0,
            "node_bytes_over_weights": 0.6,
            "node_overhead_bytes": 1 << 20,
            "weights_bytes": 1 << 20,
            "threads": 2,
            "local_setting": "one thread",
            **changes,
        }
    )


@pytest.fixture
def invoke(monkeypatch):
    """Runs the command without measuring; gives its result and what was to be measured."""

    def run(*arguments: str):
        asked: dict = {}
        monkeypatch.setattr(
            swarm, "run_bench", lambda model, **how: asked.update(how, model=model) or report_of(rounds=how["rounds"])
        )
        monkeypatch.setattr("petals_win.host.threads.apply_thread_settings", lambda threads: {"threads": "2"})
        return CliRunner().invoke(app, ["bench", *arguments]), asked

    return run


def test_the_json_object_has_figures_values_and_settings(invoke):
    done, asked = invoke("--json", "--sessions", "1, 4", "--prompt", "0", "--tokens", "8", "--model", "M")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["ratio"] == 1.25 and found["sessions_2_over_1"] == 1.75 and found["swarm_won"] == 4
    assert found["all"] == {"local_tokens_per_s": [1.2346, 2.0]} and found["thread_settings"] == {"threads": "2"}
    assert asked["sessions"] == [1, 4] and (asked["prompt"], asked["tokens"], asked["rounds"]) == (0, 8, 5)


def test_the_table_has_all_values(invoke):
    done, _ = invoke()
    assert done.exit_code == 0, done.output
    assert "two nodes and a client, times one process" in done.stdout and "sessions 2 over 1" in done.stdout
    assert "1.23" in done.stdout and "one process: one thread" in done.stdout


@pytest.mark.parametrize("wrong", [["--sessions", "1,x"], ["--sessions", "0"], ["--rounds", "4"], ["--prompt", "-1"]])
def test_wrong_numbers_are_wrong_usage(invoke, wrong):
    done, asked = invoke(*wrong)
    assert done.exit_code == 2 and not asked


def test_a_model_that_cannot_be_opened_ends_the_wait_for_it(tmp_path):
    async def wait() -> None:
        with ExitStack() as ends:
            process = OneProcess(str(tmp_path / "none.gguf"), dict(os.environ))
            ends.callback(process.stop)
            await process.wait_until_ready()

    with pytest.raises(UserError, match="There is no file or folder"):
        asyncio.run(asyncio.wait_for(wait(), 120))


def test_a_busy_program_has_a_core_and_ends():
    before = set(psutil.Process().children())
    with busy_program():
        (busy,) = set(psutil.Process().children()) - before
        deadline = time.monotonic() + 60
        while busy.cpu_times().user < 1.5 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert busy.cpu_times().user >= 1.5
    assert not busy.is_running()


def _priority(pid: int) -> object:
    return os.sched_getscheduler(pid) if sys.platform == "linux" else psutil.Process(pid).nice()


def test_awake_cores_give_way_and_end():
    before, own = set(psutil.Process().children()), _priority(os.getpid())
    with awake_cores():
        keeping = set(psutil.Process().children()) - before
        assert len(keeping) == os.cpu_count()
        assert all(_priority(each.pid) != own for each in keeping)
    assert not any(each.is_running() for each in keeping)


# -- times of answers, by an engine whose tokens come when the test says, and a clock that no other program holds up


class AtOnce(asyncio.SelectorEventLoop):
    """A loop that does not wait for its timers: as soon as there is nothing else to do, it is the time of the next one."""

    now = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._clock_resolution = 1e-9  # on Windows timers would come 16 ms too early

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:  # type: ignore[attr-defined]
            self.now = max(self.now, self._scheduled[0].when())  # type: ignore[attr-defined]
        super()._run_once()  # type: ignore[misc]


@pytest.fixture
def at_once(monkeypatch) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=AtOnce) as runner:
        monkeypatch.setattr(asking, "time", SimpleNamespace(perf_counter=runner.get_loop().time))
        yield runner


class Engine:
    """Tokens of an answer come every `pause` seconds, five times as far apart while a prompt of over 100 tokens is read."""

    def __init__(self, fails: Callable[[int], bool] = lambda _prompt: False):
        self.fails, self.reading, self.running = fails, False, 0

    def models(self) -> list[ModelCard]:
        return [ModelCard("M", 0, 4096)]

    async def generate(self, request):
        long = len(request.prompt) > 100
        self.running += 1
        try:
            if self.fails(len(request.prompt)):
                raise SwarmFull("It is full.")
            if long:
                self.reading = True
                await asyncio.sleep(2.0)
            for number in range(request.max_tokens):
                await asyncio.sleep(0.4 if self.reading and not long else 0.08)
                yield Token(f" {number}")
            yield Finished("length")
            yield Usage(len(request.prompt), request.max_tokens)
        finally:
            self.running -= 1
            self.reading = self.reading and not long


def test_answers_at_once_and_beside_a_prompt(at_once):
    async def ask():
        engine = Engine()
        asker = Asker(engine)
        seconds, texts = await asker.answers([[1], [2]], 3)
        assert texts == [" 0 1 2"] * 2 and 0.23 <= seconds < 0.25
        assert 2 <= await asker.first_token([1] * 200) < 2.5
        alone, beside = await asker.beside_a_prompt([[1], [2]], [1] * 200, 5)
        assert engine.running == 0, "what only filled the time goes on"
        return alone, beside

    alone, beside = at_once.run(ask())
    assert 0.07 <= alone < 0.09 and 0.3 <= beside < 0.5


@pytest.mark.parametrize("fails", [1, 200])
def test_what_fails_beside_a_prompt_is_told_and_all_others_end(fails):
    async def ask():
        engine = Engine(lambda prompt: prompt == fails)
        with pytest.raises(SwarmFull):
            await asyncio.wait_for(Asker(engine).beside_a_prompt([[1], [2]], [1] * 200, 2), 20)
        assert engine.running == 0

    asyncio.run(ask())
