"""Loading an engine without standing still, and letting go of one. Knows threads; not which model it is, nor why it moves."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import Future

from petals_win.engines.base import Engine
from petals_win.engines.member import Life
from petals_win.engines.offers import Offer
from petals_win.host.futures import AwaitableFuture
from petals_win.host.memory import give_back_memory

logger = logging.getLogger(__name__)


async def open_in_thread(offer: Offer) -> Engine:
    """Load it on a thread of its own, which nobody waits for when the process ends."""
    opened: AwaitableFuture[Engine] = AwaitableFuture()
    opened.set_running_or_notify_cancel()

    def load() -> None:
        try:
            opened.set_result(offer.open())
        except BaseException as error:
            opened.set_exception(error)

    threading.Thread(target=load, name="load a model", daemon=True).start()
    try:
        return await opened
    except asyncio.CancelledError:
        opened.add_done_callback(_close_unwanted)
        raise


def _close_unwanted(opened: Future[Engine]) -> None:
    """Close an engine that came when everything had ended, on a thread that has no event loop yet."""
    if opened.exception() is None:
        engine = opened.result()
        threading.Thread(target=lambda: asyncio.run(engine.close()), name="close a model", daemon=True).start()


async def let_go(life: Life, name: str) -> None:
    """Close the engine, and give its memory back."""
    try:
        await life.engine.close()
        logger.info("%s is unloaded", name)
    except Exception:
        logger.exception("%s could not be closed", name)
    del life.engine  # whoever still has the life has not the model
    await asyncio.to_thread(give_back_memory)
