"""Leave all log lines to the application if PETALS_LOGGING is false, hivemind's too.

Why: with PETALS_LOGGING=false hivemind's lines still went to a handler of its own, in another format, whatever level the
    application had set; a user saw each request and each traceback of a peer that left.
Status: pending
Upstream-issue: none
Drop-when: hivemind installs no handler when it is imported.
"""

from petals_win.upstream.declare import replace


@replace("petals.utils.logging:initialize_logs", digest="90bad7b7d7bb82dd")
def initialize_logs():
    """Set up log lines when petals is imported, unless PETALS_LOGGING is false: then they go where the application wants."""
    if os.getenv("PETALS_LOGGING", "true").lower() in ("false", "0"):
        hm_logging.use_hivemind_log_handler("nowhere")
        return
    hm_logging.use_hivemind_log_handler("in_root_logger")
    if hm_logging.loglevel != "DEBUG":
        # What asyncio complains of is mostly a peer that left.
        hm_logging.get_logger("asyncio").setLevel(os.getenv("PETALS_ASYNCIO_LOGLEVEL", "FATAL"))
