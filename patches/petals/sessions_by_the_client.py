"""Leave sessions to petals_win.client, which waits on an event loop and replays a lost server's past at another one.

Why: the session at a new server got its predecessor's inputs but began to count at 0 ("AssertionError: Broken input cache"),
    so no session survived. A server that had no room, or refused a request, was taken for one that had failed and was avoided by
    everybody. A server that hung was waited for three minutes, closing a session waited without a deadline, and so did its
    finalizer. Each session took a thread, and a long prompt was one message that only one server worked on at a time.
Status: superseded-by petals_win.client.session
Upstream-issue: https://github.com/bigscience-workshop/petals/issues/587
Drop-when: never: the path of a token is the distribution's own.
"""

from petals_win.upstream.declare import replace_module

replace_module("petals.client.inference_session", digest="23c1bfca765b7cc6")

from petals_win.client.blocking import InferenceSession, SessionCancelled  # noqa: F401
