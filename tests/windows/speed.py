"""The default model by two nodes and by one process, in turn, on this PC. Prints JSON: tokens/s of each, by round.

A short `petals-win bench`: what takes long on a slow system, its search for the best setting of one process, is left out.
"""

from __future__ import annotations

import asyncio
import json
import os

from petals_win.host.threads import apply_thread_settings

ROUNDS, TOKENS = 5, 24
REST_SECONDS = 0.3  # what has just computed may still wait awake for more


async def main() -> None:
    apply_thread_settings(None)  # before torch is imported
    from petals_win.bench.asking import connected
    from petals_win.bench.one_process import OneProcess
    from petals_win.bench.swarm import Prompts
    from petals_win.models.source import DEFAULT_MODEL, open_model
    from petals_win.swarm.local import LocalSwarm

    process = OneProcess(DEFAULT_MODEL, dict(os.environ))
    try:
        with LocalSwarm(DEFAULT_MODEL, ["0:15", "15:30"], options=["--quant", "none"]) as swarm:
            await asyncio.to_thread(swarm.wait_until_serving)
            await process.wait_until_ready()
            prompt = Prompts(open_model(DEFAULT_MODEL)).short(1)
            async with connected(DEFAULT_MODEL, swarm.peers) as asker:
                speeds: list[tuple[float, float]] = []
                for _round in range(1 + ROUNDS):
                    one, _ = await process.generate(prompt, TOKENS)
                    await asyncio.sleep(REST_SECONDS)
                    nodes, _ = await asker.answers(prompt, TOKENS)
                    await asyncio.sleep(REST_SECONDS)
                    speeds.append((TOKENS / nodes, TOKENS / one))
        print(json.dumps(speeds[1:]))  # the first one has warmed up
    finally:
        process.stop()


if __name__ == "__main__":
    asyncio.run(main())
