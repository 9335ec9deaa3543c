"""End a question whose route cannot be looked up, instead of waiting for ever.

Why: the first question waits without a deadline for a flag that a look-up sets when it succeeds. One that raised never set it: the
    client hung, and on Windows Ctrl+C with it.
Status: pending
Upstream-issue: none
Drop-when: upstream's look-ups pass their failure on to whoever waits for them.
"""

from petals_win.upstream.declare import add_import, remove, replace, swap_call

add_import("petals.client.routing.sequence_manager", "from petals_win.client.looking import LookUpThread")
remove("petals.client.routing.sequence_manager:_SequenceManagerUpdateThread", digest="32ae022cc5dee4c3")
swap_call(
    "petals.client.routing.sequence_manager:RemoteSequenceManager.__init__",
    "_SequenceManagerUpdateThread",
    "LookUpThread",
    digest="c99820b94391495f",
)


@replace("petals.client.routing.sequence_manager:RemoteSequenceManager.update", digest="6b7a7b0d71525fcd")
def update(self, *, wait: bool):
    """Look servers up again soon; with `wait`, return when that is done, or raise LookUpFailed."""
    self.ready.clear()
    if wait:
        self._thread.look_up(self.config.request_timeout)
    else:
        self._thread.trigger.set()
