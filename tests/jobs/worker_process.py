"""A worker in a process of its own, whose engine follows a script (api.fake_engine): python worker_process.py SCHEME [PORT].

Its first line is its address. Each line of its standard input sets the engine: "full 1", "full 0", "pace SECONDS", and is
answered by a line. Its end ends it.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from api.fake_engine import FakeEngine  # noqa: E402

from petals_win.jobs import links  # noqa: E402
from petals_win.jobs.keys import OwnSecrets, shared_key  # noqa: E402
from petals_win.jobs.worker import Worker  # noqa: E402


async def main(scheme: str, port: int) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    engine = FakeEngine()

    def follow_orders() -> None:
        for line in sys.stdin:
            name, value = line.split()
            setattr(engine, name, type(getattr(engine, name))(float(value)))
            print("done", flush=True)
        loop.call_soon_threadsafe(ended.set)

    door = links.new_door(scheme, OwnSecrets.kept(shared_key(None, make=True)))
    worker = Worker(engine, "child", slots=32)
    bound = await door.open("127.0.0.1", port, worker.answer)
    print(links.Address(scheme, "127.0.0.1", bound, door.pin).pinned, flush=True)
    threading.Thread(target=follow_orders, daemon=True).start()
    await ended.wait()
    worker.drain()
    await worker.drained(5)
    await door.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0))
