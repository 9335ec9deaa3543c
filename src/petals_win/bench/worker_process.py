"""A worker in a process of its own, which can be killed and started again at the same address.

`python -m petals_win.bench.worker_process SCHEME PORT MODEL PACE` is the process, in which the model "steady" is a script with so many seconds
between tokens. Knows the child's one line. Does not know what is asked.
"""

from __future__ import annotations

import asyncio
import os
import queue
import random
import secrets
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from petals_win.bench.steady import MODEL as STEADY
from petals_win.bench.steady import SteadyEngine
from petals_win.engines.base import Engine
from petals_win.errors import UserError
from petals_win.host.children import Child, exit_with_parent, spawn
from petals_win.host.folders import private_folder, write_private
from petals_win.host.ports import check_port_free
from petals_win.host.signals import stop_event
from petals_win.jobs.keys import OwnSecrets, shared_key
from petals_win.jobs.links import Address, connect, new_door, parse_address
from petals_win.jobs.router import RoutedEngine
from petals_win.jobs.worker import Worker

_START_S = 300.0
_LOOK_S = 0.05
_ADDRESS = "worker at "
PACE_S = 0.02
SLOTS = 16


class WorkerProcess:
    """Its key and certificate are in `home`, which workers of one run share, as processes of one PC do."""

    def __init__(self, scheme: str, model: str, home: Path, pace_s: float = PACE_S):
        self._scheme, self._model, self._home, self._pace_s = scheme, model, home, pace_s
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._child: Child | None = None
        self.address: Address | None = None

    async def start(self) -> Address:
        """At the address that it had before, if it had one. Raises UserError if it does not tell one in time."""
        port = self.address.port if self.address else _free_port()
        command = [sys.executable, "-m", "petals_win.bench.worker_process", self._scheme, str(port), self._model]
        command.append(str(self._pace_s))
        environment = {**os.environ, "PETALS_WIN_HOME": str(self._home)}
        self._child = await asyncio.to_thread(spawn, command, env=environment, on_line=self._lines.put)
        deadline = time.monotonic() + _START_S
        while True:
            with suppress(queue.Empty):
                while not (line := self._lines.get_nowait()).startswith(_ADDRESS):
                    pass
                self.address = parse_address(line.removeprefix(_ADDRESS))
                return self.address
            if (ended := self._child.returncode is not None) or time.monotonic() > deadline:
                if ended:
                    await asyncio.to_thread(self._child.wait, 1)  # for its last lines
                said = "".join(f"\n    {line}" for line in self._child.output_tail(5))
                raise UserError(f"A worker does not start. Its last lines:{said}")
            await asyncio.sleep(_LOOK_S)

    async def kill(self) -> None:
        """At once, as when its PC loses power; afterwards it is gone."""
        if self._child is not None:
            with suppress(psutil.NoSuchProcess):
                psutil.Process(self._child.pid).kill()
            await asyncio.to_thread(self._child.stop)

    async def stop(self) -> None:
        if self._child is not None:
            await asyncio.to_thread(self._child.stop)


def _free_port() -> int:
    """One that no system picks for a connection: it would be taken while the worker is away, even by whoever asks for the worker."""
    while True:
        port = random.randint(20_000, 29_999)
        with suppress(UserError):
            check_port_free("127.0.0.1", port)
            return port


def make_secrets(home: Path) -> None:
    """The key and what workers are known by, before several of them start at once."""
    folder = home / "data" / "worker"
    private_folder(folder)
    key = secrets.token_urlsafe(32)
    write_private(folder / "key", f"{key}\n".encode())
    for scheme in ("grpc", "zmq"):
        OwnSecrets(key, folder).pin(scheme)


def router_over(workers: list[WorkerProcess], home: Path) -> RoutedEngine:
    """The engine of an API over workers that have started."""
    key = shared_key(home / "data" / "worker" / "key", make=False)
    return RoutedEngine([w.address for w in workers if w.address], lambda address: connect(address, key))


def _open(model: str, pace_s: float) -> Engine:
    if model == STEADY:
        return SteadyEngine(pace_s)
    from petals_win.host.threads import apply_thread_settings

    apply_thread_settings(1)
    from petals_win.engines.registry import EngineSettings, find_engine

    return find_engine("local")(EngineSettings(model))


async def _serve(engine: Engine, scheme: str, port: int) -> None:
    loop, ended, stop = asyncio.get_running_loop(), asyncio.Event(), stop_event()
    door = new_door(scheme, OwnSecrets.kept(shared_key(None, make=True)))
    await engine.start(lambda why: sys.exit(str(why)))
    bound = await door.open("127.0.0.1", port, Worker(engine, f"{scheme}-{os.getpid()}", slots=SLOTS).answer)
    print(_ADDRESS + Address(scheme, "127.0.0.1", bound, door.pin).pinned, flush=True)
    waiting = loop.run_in_executor(None, stop.wait)
    waiting.add_done_callback(lambda _: ended.set())
    await ended.wait()
    await door.close()
    await engine.close()


if __name__ == "__main__":
    exit_with_parent()
    asyncio.run(_serve(_open(sys.argv[3], float(sys.argv[4])), sys.argv[1], int(sys.argv[2])))
