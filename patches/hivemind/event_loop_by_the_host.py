"""Take the event loop that petals_win.host chooses.

Why: uvloop has no Windows build ("ModuleNotFoundError: No module named 'uvloop'" at import hivemind); Windows needs the
    Proactor loop for child processes, and stopping the caller's loop from another thread is a race. Finalizers asked for the
    current loop in threads that have none ("RuntimeError: There is no current event loop in thread 'MainThread'").
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


@replace("hivemind.utils.asyncio:cancel_task_if_running", digest="42a8b35df172a0a6")
def cancel_task_if_running(task: Optional[asyncio.Task]) -> None:
    """Cancel a task from whatever thread; without effect when it is done or its loop no longer runs."""
    if task is None or task.done() or not task.get_loop().is_running():
        return
    if asyncio._get_running_loop() is task.get_loop():
        task.cancel()
    else:
        task.get_loop().call_soon_threadsafe(task.cancel)
