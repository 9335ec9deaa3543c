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

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="a console event reaches every process of the console, this test's own included"
)


def start(seconds):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_the_first_signal_sets_the_event(name):
    process = start(0)
    with process:
        process.send_signal(getattr(signal, name))
        assert process.wait(10) == 0


def test_the_second_signal_ends_the_process_at_once():
    process = start(600)
    with process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None and process.stdout.readline() == "told\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


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
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30)
    assert "main thread" in done.stdout
