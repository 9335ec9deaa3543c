"""A look-up that fails or takes for ever ends the question that waits for it."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from functools import partial

import pytest
from hivemind import DHT
from petals.client.config import ClientConfig
from petals.client.routing import sequence_manager
from petals.client.routing.sequence_manager import RemoteSequenceManager

from petals_win.client.looking import LookUpFailed
from petals_win.node.announcing import repeat


@pytest.fixture(scope="module")
def dht():
    dht = DHT(start=True)
    yield dht
    dht.shutdown()


@pytest.fixture
def manager(dht):
    made = RemoteSequenceManager(ClientConfig(dht_prefix="x", request_timeout=1), ["x.0", "x.1"], dht=dht)
    yield made
    made.shutdown()


def fail(*_arguments, **_settings):
    raise AttributeError("'int' object has no attribute 'b58decode'")


def test_what_a_look_up_raises_ends_the_question(manager, monkeypatch):
    monkeypatch.setattr(sequence_manager, "get_remote_module_infos", fail)
    for ask in (
        lambda: manager.make_sequence(mode="min_latency"),
        lambda: manager.rpc_info,
        lambda: manager.update(wait=True),
    ):
        began = time.monotonic()
        with pytest.raises(LookUpFailed, match="b58decode") as caught:
            ask()
        assert isinstance(caught.value.__cause__, AttributeError)
        assert time.monotonic() - began < 20
    monkeypatch.undo()
    with pytest.raises(sequence_manager.MissingBlocksError):  # the next look-up is a new chance
        manager.make_sequence(mode="min_latency")


@pytest.fixture
def endless(monkeypatch):
    """Look-ups do not end; the event is set as soon as there is one."""
    begun, end = threading.Event(), threading.Event()

    def look_up(*_arguments, **_settings):
        begun.set()
        end.wait(60)
        return []

    monkeypatch.setattr(sequence_manager, "get_remote_module_infos", look_up)
    yield begun
    end.set()


def test_a_look_up_without_end_has_a_deadline(manager, endless):
    began = time.monotonic()
    with pytest.raises(LookUpFailed, match="within 1 s"):
        manager.make_sequence(mode="min_latency")
    assert time.monotonic() - began < 20


@pytest.fixture
def ctrl_c():
    """As at a terminal: a shell lets what it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_ends_the_waiting(dht, endless, ctrl_c):
    manager = RemoteSequenceManager(ClientConfig(dht_prefix="x"), ["x.0"], dht=dht)
    press = _thread.interrupt_main if sys.platform == "win32" else partial(os.kill, os.getpid(), signal.SIGINT)
    pressed: list[float] = []

    def press_while_it_waits() -> None:
        assert endless.wait(30)
        time.sleep(0.2)
        pressed.append(time.monotonic())
        press()

    pressing = threading.Thread(target=press_while_it_waits)
    pressing.start()
    with pytest.raises(KeyboardInterrupt):
        manager.make_sequence(mode="min_latency")
    pressing.join(20)
    assert time.monotonic() - pressed[0] < 20
    manager._thread.shutdown(0)


def test_after_the_end_nobody_waits(dht):
    manager = RemoteSequenceManager(ClientConfig(dht_prefix="x"), ["x.0"], dht=dht)
    manager.update(wait=True)
    manager.shutdown()
    with pytest.raises(LookUpFailed, match="shut down"):
        manager.update(wait=True)


def test_a_thread_that_announces_survives_any_failure():
    calls, trigger, leaving = [], threading.Event(), threading.Event()

    def once():
        calls.append(leaving.is_set())
        if len(calls) == 3:
            leaving.set()
            trigger.set()
        raise OSError("no way out")

    thread = threading.Thread(target=repeat, args=(once, "announce", 0.01, trigger, leaving.is_set))
    thread.start()
    thread.join(20)
    assert not thread.is_alive() and calls == [False, False, False, True]
