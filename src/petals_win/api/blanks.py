"""Blanks ahead of a whole answer that takes long, for proxies that give up on a silent server.

Knows when a response begins. Does not know what is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from petals_win.api.errors import ApiError

logger = logging.getLogger(__name__)

# Errors that come before it still have a status of their own; proxies wait for a minute, as a rule.
FIRST_BLANK_S = 10.0
BLANK_S = 15.0

_KEY = "petals_win.whole_answer"


def expect_whole_answer(scope: Scope) -> None:
    """Say that the response to this request will be JSON, which may begin with blanks, and that it may take long."""
    if (expected := scope.get(_KEY)) is not None:
        expected.set()


class BlanksAhead:
    """Begins the response to whoever waits for a whole answer with status 200 and sends blanks until the answer is there.

    What goes wrong after that is told in the body alone.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        expected = scope[_KEY] = asyncio.Event()
        response = _Response(send)
        blanks = asyncio.create_task(response.send_blanks(expected))
        try:
            await self._app(scope, receive, response.send)
        except Exception:
            if not response.began_with_blanks:
                raise
            logger.exception("An answer failed that had begun with blanks")
            failed = ApiError(500, "An error inside petals-win; its log has the details.").response()
            await failed(scope, receive, response.send)
        finally:
            blanks.cancel()
            await asyncio.wait([blanks])


class _Response:
    """One response, which begins with blanks or by itself."""

    def __init__(self, send: Send):
        self._send = send
        self._turn = asyncio.Lock()  # a blank and the answer must not begin the response at the same time
        self._answered = False
        self.began_with_blanks = False

    async def send_blanks(self, expected: asyncio.Event) -> None:
        await expected.wait()
        await asyncio.sleep(FIRST_BLANK_S)
        with contextlib.suppress(OSError):  # nobody reads any more, which the answer finds out by itself
            while await self._send_blank():
                await asyncio.sleep(BLANK_S)

    async def _send_blank(self) -> bool:
        """False if the answer has come."""
        async with self._turn:
            if self._answered:
                return False
            if not self.began_with_blanks:
                self.began_with_blanks = True
                headers = [(b"content-type", b"application/json; charset=utf-8"), (b"cache-control", b"no-store")]
                headers.append((b"x-accel-buffering", b"no"))  # nginx would keep them
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": b" ", "more_body": True})
            return True

    async def send(self, message: Message) -> None:
        """Send what the app sends, without a beginning if there was one."""
        async with self._turn:
            self._answered = True
            if message["type"] != "http.response.start" or not self.began_with_blanks:
                await self._send(message)
