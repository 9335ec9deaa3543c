"""How a process is told to end."""

import signal
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import sys, time
    from petals_win.host.signals import stop_event
    stop = stop_event()
    assert stop is stop_event()
    print("up", flush=True)
    stop.wait()
    print("told", flush=True)
    time.sleep(float(sys.argv[1]))
"""

posix_only = pytest.mark.skipif(
    sys.platform == "win32",
    reason="Windows has no signals between processes: a console event reaches the test as well",
)

# Stands in for Windows, which calls the handler on a thread of its own and ends the process when it returns.
CLOSED_CONSOLE = """
    import os, sys, threading, time
    from petals_win.host.signals import on_console_event, stop_event
    stop = stop_event()
    def system():
        on_console_event(int(sys.argv[1]))
        os._exit(9)
    threading.Thread(target=system, daemon=True).start()
    if not stop.wait(20):
        sys.exit("nobody asked to stop")
    time.sleep(0.5)
    print("left in order", flush=True)
"""


def start(seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


@posix_only
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_first_signal_sets_the_event(name):
    process = start(0)
    with process:
        process.send_signal(getattr(signal, name))
        assert process.wait(30) == 0


@posix_only
def test_the_second_signal_ends_the_process_at_once():
    process = start(600)
    with process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None and process.stdout.readline() == "told\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


def test_handlers_belong_to_the_main_thread():
    program = """
        import threading
        from petals_win.host.signals import stop_event
        def ask():
            try:
                stop_event()
            except RuntimeError as e:
                print(e)
        thread = threading.Thread(target=ask); thread.start(); thread.join()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert "main thread" in done.stdout


@pytest.mark.parametrize("event", [2, 6], ids=["console closed", "shutdown"])
def test_a_process_whose_console_goes_has_time_to_leave(event):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CLOSED_CONSOLE), str(event)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "left in order\n"), done.stderr


def test_a_service_outlives_the_logoff_of_a_user():
    program = """
        from petals_win.host.signals import on_console_event, stop_event
        stop = stop_event()
        assert on_console_event(5), "left to others, it would be taken for Ctrl+Break"
        assert not on_console_event(0) and not on_console_event(1), "signals: Python sees to them"
        assert not stop.wait(0.3)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
