"""Children end with their parent, however it ends, and when they are asked to."""

import asyncio
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from petals_win.host.children import exit_with_parent, spawn, start_child
from petals_win.host.loop import new_event_loop

SLEEP = "import time; time.sleep(600)"
NODE = """
    from petals_win.host.children import exit_with_parent
    from petals_win.host.signals import stop_event
    exit_with_parent()
    stop = stop_event()
    print("up", flush=True)
    stop.wait()
    print("leaves in order", flush=True)
"""
# A node that is stuck, and has not even asked for the stop event.
STUCK = """
    import signal, time
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", flush=True)
    time.sleep(600)
"""


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


def run(coroutine):
    loop = new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def wait_for_line(child, line, seconds=30):
    deadline = time.monotonic() + seconds
    while line not in child.output_tail():
        assert time.monotonic() < deadline, child.output_tail()
        time.sleep(0.02)


def started_by_a_parent_that_is_killed(code):
    """Run a parent that prints its child's id, end it by force, return the child."""
    parent = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.3)
        assert child.is_running()
        parent.kill()
        parent.wait(30)
    return child


def test_output_and_status():
    lines = []
    child = spawn(python("print('one'); print('zwei €'); raise SystemExit(3)"), on_line=lines.append)
    assert child.wait(30) == 3 and child.returncode == 3
    assert child.output_tail() == lines == ["one", "zwei €"]
    assert child.output_tail(1) == ["zwei €"]


def test_a_child_is_asked_to_end_and_does_so_in_order():
    child = spawn(python(NODE))
    wait_for_line(child, "up")
    assert child.returncode is None
    assert child.stop(30) == 0
    assert child.output_tail(1) == ["leaves in order"]
    assert child.stop(30) == 0  # again does no harm


def test_a_child_that_does_not_end_is_ended():
    child = spawn(python(STUCK))
    wait_for_line(child, "up")
    began = time.monotonic()
    assert child.stop(0.5) != 0
    assert time.monotonic() - began < 30
    assert not psutil.pid_exists(child.pid)


def test_a_forced_end_takes_grandchildren_along():
    child = spawn(python(f"""
            import signal, subprocess, sys, time
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print(subprocess.Popen([sys.executable, "-c", {SLEEP!r}], stdin=subprocess.DEVNULL).pid, flush=True)
            time.sleep(600)
        """))
    deadline = time.monotonic() + 30
    while not child.output_tail() and time.monotonic() < deadline:
        time.sleep(0.02)
    grandchild = psutil.Process(int(child.output_tail()[0]))
    child.stop(0.2)
    psutil.wait_procs([grandchild], timeout=30)
    assert not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE


def test_a_node_leaves_in_order_when_its_parent_is_killed(tmp_path):
    left = tmp_path / "left"
    node = textwrap.dedent(NODE) + f"\nopen({str(left)!r}, 'w').close()\n"
    child = started_by_a_parent_that_is_killed(f"""
        import sys, time
        from petals_win.host.children import spawn
        child = spawn([sys.executable, "-c", {node!r}])
        while "up" not in child.output_tail():
            time.sleep(0.02)
        print(child.pid, flush=True)
        time.sleep(600)
    """)
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()
    if sys.platform != "win32":  # where its job object ends it at once
        assert left.exists()


def test_a_process_without_stop_event_ends_at_once_with_its_parent():
    program = f"from petals_win.host.children import exit_with_parent; exit_with_parent(); {SLEEP}"
    child = started_by_a_parent_that_is_killed(f"""
        import sys, time
        from petals_win.host.children import spawn
        child = spawn([sys.executable, "-c", {program!r}])
        print(child.pid, flush=True)
        time.sleep(600)
    """)
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no means to end a child that does not watch its input")
def test_a_child_that_does_not_look_ends_with_its_killed_parent():
    child = started_by_a_parent_that_is_killed(f"""
        import asyncio, sys
        from petals_win.host.children import start_child
        async def main():
            child = await start_child(sys.executable, "-c", {SLEEP!r})
            print(child.pid, flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """)
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()


@pytest.mark.skipif(sys.platform != "win32", reason="job objects are Windows'")
def test_whatever_a_program_of_ours_starts_ends_with_it():
    child = started_by_a_parent_that_is_killed(f"""
        import subprocess, sys, time
        from petals_win.host.children import end_children_with_this_process
        end_children_with_this_process()
        print(subprocess.Popen([sys.executable, "-c", {SLEEP!r}]).pid, flush=True)
        time.sleep(600)
    """)
    psutil.wait_procs([child], timeout=30)
    assert not child.is_running()


def test_start_child_is_called_like_asyncios_function():
    async def main():
        child = await start_child(
            *python("import os, sys; print(os.environ['COLOUR'], sys.stdin.read())"),
            env={"COLOUR": "blue", "PATH": "", "SYSTEMROOT": "C:\\Windows"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await child.communicate(b"sky")
        return output, child.returncode

    assert run(main()) == (b"blue sky" + (b"\r\n" if sys.platform == "win32" else b"\n"), 0)


def test_start_child_says_what_cannot_be_run(tmp_path):
    nothing = tmp_path / "nothing"

    async def main():
        try:
            child = await start_child(nothing, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
        except OSError as e:
            return str(e)
        output, _ = await child.communicate()
        assert child.returncode != 0
        return output.decode()

    message = run(main())
    assert "such file" in message.lower() or "find the file" in message
    assert "nothing" in message or sys.platform == "win32"  # whose event loops do not name it


def test_exit_with_parent_leaves_other_processes_alone():
    exit_with_parent()  # this process was not made by spawn, and its input may well be at its end
    ended = subprocess.run(
        python(
            "from petals_win.host.children import exit_with_parent; exit_with_parent(); import time; time.sleep(0.3)"
        ),
        stdin=subprocess.DEVNULL,
        timeout=30,
    )
    assert ended.returncode == 0
