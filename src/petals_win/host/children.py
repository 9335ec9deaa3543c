"""Child processes that end with their parent, however the parent ends.

Knows the three means for that, none of which is enough everywhere:

* A held pipe: the child's standard input is a pipe whose other end only the parent has, so it reads end-of-file when
  the parent is gone, even after SIGKILL. It works on every system and from any thread, but the child has to look. Our
  own programs do (`exit_with_parent`), and closing the pipe is also how they are asked to end: unlike console events
  it needs no console on Windows.
* Linux, PR_SET_PDEATHSIG: the kernel ends a child that does not look. The parent that it means is the *thread* that
  started the child, so it is only set for children that belong to one event loop (`start_child`). It is not set in a
  preexec_fn, which would run Python between fork and exec in a process full of threads and locks, and copy the page
  tables of the loaded model besides, but by a few lines of Python that then become the child.
* Windows, a job object that is closed with the parent's last handle: sure, and it takes grandchildren along. A program
  of ours is in its own one besides (`end_children_with_this_process`).

Does not know what the children are for.
"""

import asyncio
import collections
import logging
import os
import subprocess
import sys
import threading
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from petals_win.host.process_tree import ProcessTree
from petals_win.host.signals import request_stop

logger = logging.getLogger(__name__)

_HELD_PIPE = "PETALS_WIN_HELD_PIPE"
_ASKED = "stop"  # what is in the held pipe when the parent is still there, and reads the output
_GRACE_S = 15.0  # for an orderly end after the parent has gone

_DIE_WITH_THREAD = """
import ctypes, os, sys
parent, program = int(sys.argv[1]), sys.argv[2:]
ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
if os.getppid() != parent:
    sys.exit(1)
try:
    os.execvp(program[0], program)
except OSError as e:
    sys.exit(f"{e.strerror}: {program[0]}")
"""


async def start_child(
    *argv: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
    stdin: int | None = PIPE,
    stdout: int | None = None,
    stderr: int | None = None,
) -> Process:
    """`asyncio.create_subprocess_exec` for a child that ends with this process.

    On Linux it also ends with the thread of the running event loop. What keeps the program from starting raises
    OSError, or on Linux is the child's last line of output.
    """
    command = die_with_this_thread([os.fspath(arg) for arg in argv])
    options: dict[str, Any] = {}
    if sys.platform == "win32" and isinstance(asyncio.get_running_loop(), asyncio.ProactorEventLoop):
        # In this process's console the child would end with it when its window is closed, before this process can leave
        # in order; without a console, as a service, it would open a window. winloop cannot ask for that.
        options["creationflags"] = subprocess.CREATE_NO_WINDOW
    process = await asyncio.create_subprocess_exec(
        *command, env=env, stdin=stdin, stdout=stdout, stderr=stderr, **options
    )
    if sys.platform == "win32":
        _join(_tree_of_this_process(), process.pid)
    return process


def die_with_this_thread(command: list[str]) -> list[str]:
    """On Linux, the command that starts `command` so that it ends with the thread that starts it; elsewhere `command`."""
    if sys.platform != "linux":
        return command
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_THREAD, str(os.getpid()), *command]


class Child:
    """A running child process of ours, its end and its last lines of output. Made by `spawn`."""

    def __init__(self, process: "subprocess.Popen[str]", on_line: Callable[[str], None] | None):
        self._process = process
        self._tail: collections.deque[str] = collections.deque(maxlen=200)
        self._on_line = on_line
        self._reader = threading.Thread(target=self._read, name=f"output of {process.pid}", daemon=True)
        self._reader.start()
        self._tree = ProcessTree()
        _join(self._tree, process.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, None while it runs; on POSIX minus the number of the signal that ended it."""
        return self._process.poll()

    def output_tail(self, lines: int = 20) -> list[str]:
        """The last lines of standard output and standard error, oldest first."""
        return list(self._tail)[-lines:]

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; returns the exit status, raises TimeoutError after `timeout` seconds."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"Process {self.pid} still runs after {timeout:g} s") from None
        self._reader.join(1)  # not for ever: a grandchild may hold the pipe
        return status

    def tell(self, line: str) -> None:
        """Write a line to its standard input, for a child that reads it (`read_line`) before it calls `exit_with_parent`."""
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError):  # it has ended
            pipe.write(f"{line}\n")
            pipe.flush()

    def ask_to_end(self) -> None:
        """Returns at once; `stop` waits. Safe to call twice."""
        pipe = self._process.stdin
        if pipe is None or pipe.closed:
            return
        if sys.platform != "win32":
            # First: in the middle of its way out, which it begins when it is asked, Python no longer handles signals.
            self._process.terminate()
        with suppress(OSError):  # it has ended, and with it the other end of the pipe
            pipe.write(_ASKED)
            pipe.close()

    def stop(self, timeout: float = 10.0) -> int:
        """Ask the process to end, and end it by force after `timeout` seconds. Safe to call twice."""
        self.ask_to_end()
        try:
            return self.wait(timeout)
        except TimeoutError:
            logger.warning(
                "Process %d does not end within %g s of being asked to; ending it by force", self.pid, timeout
            )
            self._tree.kill()
            return self.wait(5)
        finally:
            self._tree.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output:
            for line in output:
                self._tail.append(line.rstrip("\r\n"))
                if self._on_line is not None:
                    self._on_line(line.rstrip("\r\n"))


def spawn(
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Child:
    """Start a Python program of ours that calls `exit_with_parent` early.

    It gets a process group (on Windows a console without a window) of its own, so that Ctrl+C and the end of the console
    reach only this process, which then stops its children in the order that suits. `on_line` is called, on a thread of its own, with each line of output.
    """
    environment = {**(os.environ if env is None else env), _HELD_PIPE: "1", "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    options: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    process = subprocess.Popen(
        [os.fspath(arg) for arg in argv],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        **options,
    )
    return Child(process, on_line)


def end_children_with_this_process() -> None:
    """In a program of ours on Windows: whatever it starts from now on ends with it. Elsewhere: do nothing.

    A process that is being created when its creator is ended by force stays behind, suspended for ever, unless it is in the
    creator's own job object from the first moment. `spawn` and `start_child` put it into one a moment later.
    """
    if sys.platform == "win32":
        _join(_tree_of_this_process(), os.getpid())


def read_line() -> str | None:
    """The next line of standard input, and not a byte more; None if it ends before the line does."""
    line = bytearray()
    while (byte := os.read(0, 1)) not in (b"", b"\n"):
        line += byte
    return line.decode(errors="replace").strip() if byte else None


def exit_with_parent() -> None:
    """In a process that `spawn` started: end it when the parent asks for it or is gone. Elsewhere: do nothing.

    The stop event (host.signals) is set first; a process that nobody has told to watch that event, or that is not done
    15 seconds later, ends at once with status 1.
    """
    if os.environ.pop(_HELD_PIPE, None) is None:
        return
    # A pending read locks the pipe on Windows: a grandchild that inherits it as its standard input would hang at start.
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        if not os.read(pipe, 1):
            # Nobody reads the output any more: a last word must not raise BrokenPipeError in the middle of the clean-up.
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
        if request_stop():
            time.sleep(_GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


@cache
def _tree_of_this_process() -> ProcessTree:
    return ProcessTree()


def _join(tree: ProcessTree, pid: int) -> None:
    try:
        tree.add(pid)
    except OSError as e:
        # Ended already, or a sandbox that forbids nested jobs: the held pipe is left.
        logger.warning("Process %d is in no job object: %s", pid, e)
