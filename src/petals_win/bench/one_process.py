"""A model as transformers computes it, in a process of its own, so that a client in this one is not in its way.

Knows the child process's requests and answers, a line of JSON each. `python -m petals_win.bench.one_process MODEL` is the
child. Does not know swarms.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any

from petals_win.errors import UserError
from petals_win.host.children import read_line, spawn
from petals_win.host.imports import importing

_ANSWER = '{"bench"'  # what the child's lines to its parent begin with; all others are for people
_LOAD_SECONDS, _ANSWER_SECONDS = 900.0, 3600.0
_LOOK_SECONDS = 0.05
_SPINNING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # what petals_win.host.threads sets of OpenMP's waiting
_TRIALS, _TRIAL_TOKENS = 3, 8
_HOPELESS = 2.0  # a setting that takes so many times the best one's time in its first trial gets no other


class OneProcess:
    """A child process with the whole model. Raises UserError wherever it has ended or answers in no time."""

    def __init__(self, model: str, environment: dict[str, str]):
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

        def take(line: str) -> None:
            if line.startswith(_ANSWER):
                self._answers.put(json.loads(line))

        command = [sys.executable, "-m", "petals_win.bench.one_process", model]
        self._child = spawn(command, env=environment, on_line=take)

    async def wait_until_ready(self) -> None:
        await self._next(_LOAD_SECONDS)

    async def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[list[int]]]:
        """One batch of greedy answers of exactly so many tokens to prompts of one length: seconds, and the tokens."""
        self._child.tell(json.dumps({"prompts": [list(prompt) for prompt in prompts], "tokens": tokens}))
        answer = await self._next(_ANSWER_SECONDS)
        return answer["seconds"], answer["tokens"]

    def stop(self) -> None:
        self._child.stop()

    async def _next(self, seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while True:
            with suppress(queue.Empty):
                return self._answers.get_nowait()
            ended = self._child.returncode is not None
            if ended or time.monotonic() > deadline:
                if ended:
                    await asyncio.to_thread(self._child.wait, 1)  # for its last lines
                said = "".join(f"\n    {line}" for line in self._child.output_tail(5))
                raise UserError(f"The process with the whole model does not answer. Its last lines:{said}")
            await asyncio.sleep(_LOOK_SECONDS)


async def fastest_process(
    model: str, prompt: Sequence[int], ends: ExitStack, report: Callable[[str], None]
) -> tuple[OneProcess, str]:
    """A process with the whole model and the fastest of three settings of OpenMP for one answer, and that setting in words.

    `ends` gets what stops the processes, of which at most two run at once.
    """
    given = dict(os.environ)
    candidates = {
        "one thread": {**given, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},  # first: it never takes minutes
        "threads that wait as petals-win's do": given,
        "threads that wait as OpenMP has it": {n: value for n, value in given.items() if n not in _SPINNING},
    }
    best: tuple[float, OneProcess, str] | None = None
    for setting, environment in candidates.items():
        process = OneProcess(model, environment)
        ends.callback(process.stop)
        await process.wait_until_ready()
        await process.generate([prompt], 1)  # warm up
        trials: list[float] = []
        while len(trials) < _TRIALS and (best is None or not trials or min(trials) < _HOPELESS * best[0]):
            trials.append((await process.generate([prompt], _TRIAL_TOKENS))[0])
        seconds = statistics.median(trials)
        report(f"one process, {setting}: {_TRIAL_TOKENS / seconds:.1f} tokens/s")
        if best is None or seconds < best[0]:
            if best is not None:
                best[1].stop()
            best = seconds, process, setting
        else:
            process.stop()
    assert best is not None
    return best[1], best[2]


def _serve(model: str) -> None:
    """The child: answer lines of standard input until it ends, which it does with the parent."""
    with importing():
        import torch

        from petals_win.models.source import open_model

    whole: Any = open_model(model).whole_model()
    _say(ready=True)
    while (line := read_line()) is not None:
        asked = json.loads(line)
        prompts, tokens = torch.tensor(asked["prompts"]), asked["tokens"]
        begin = time.perf_counter()
        texts = whole.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
        )
        seconds = time.perf_counter() - begin
        _say(seconds=seconds, tokens=texts[:, prompts.shape[1] :].tolist())


def _say(**facts: object) -> None:
    print(json.dumps({"bench": "answer", **facts}), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
