"""Take the event loop that petals_win.host chooses.

Why: uvloop has no Windows build ("ModuleNotFoundError: No module named 'uvloop'" at import hivemind); Windows needs the
    Proactor loop for child processes, and stopping the caller's loop from another thread is a race.
Status: windows-only
Upstream-issue: none
Drop-when: hivemind treats uvloop as optional.
"""

from petals_win.upstream.declare import add_import, remove_import, replace

remove_import("hivemind.utils.asyncio", "uvloop")
add_import("hivemind.utils.asyncio", "from petals_win.host.loop import new_event_loop")


@replace("hivemind.utils.asyncio:switch_to_uvloop", digest="109aa0e27ad8a336")
def switch_to_uvloop() -> asyncio.AbstractEventLoop:
    """A new event loop of the kind that suits this system, made current for the calling thread."""
    loop = new_event_loop()
    asyncio.set_event_loop(loop)
    return loop
