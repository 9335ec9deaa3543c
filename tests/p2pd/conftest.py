"""The daemons under test: this repository's, built here, and upstream's as the reference where it runs."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from p2pd_client import NAME, Daemon, Persistent, Program, serve

from petals_win.daemon.build import build_if_changed, this_target
from petals_win.errors import UserError
from petals_win.upstream.build import extract_daemon, this_checkout

ROOT = Path(__file__).resolve().parents[2]
_UNIX = sys.platform != "win32"

# Which control sockets there are, and the reference. Statements that upstream does not keep are tested on ours alone.
OURS = ["ours", "ours-tcp"] if _UNIX else ["ours-tcp"]
BOTH = [*OURS, "reference"]


@pytest.fixture(scope="session")
def our_program() -> str:
    """This repository's daemon, built from its present source, or PETALS_WIN_TESTED_P2PD."""
    return os.environ.get("PETALS_WIN_TESTED_P2PD") or str(build_if_changed(this_target()))


@pytest.fixture(scope="session")
def reference_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Upstream's daemon: PETALS_WIN_REFERENCE_P2PD, or the one in upstream's wheel."""
    chosen = os.environ.get("PETALS_WIN_REFERENCE_P2PD")
    if chosen:
        return chosen
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("upstream's daemon, the reference, exists for Linux on x86_64 only")
    output = tmp_path_factory.mktemp("reference") / "p2pd"
    try:
        extract_daemon(this_checkout(), output)
    except UserError as e:
        pytest.skip(f"upstream's wheel, which holds the reference daemon, cannot be had: {e}")
    return str(output)


@pytest.fixture(scope="session")
def ours(our_program: str) -> Program:
    return Program("ours", (our_program,), speaks_secret=True, tcp=not _UNIX)


@pytest.fixture(scope="session")
def reference(reference_program: str) -> Program:
    return Program("reference", (reference_program,), speaks_secret=False)


@pytest.fixture
def windows(request: pytest.FixtureRequest) -> Program:
    """A daemon built for Windows, by the command that runs it here."""
    command = os.environ.get("PETALS_WIN_WINDOWS_P2PD")
    if not command:
        pytest.skip("PETALS_WIN_WINDOWS_P2PD is not set to a command that runs a p2pd built for Windows")
    return Program("windows", tuple(shlex.split(command)), speaks_secret=True, tcp=True)


def resolve(name: str, request: pytest.FixtureRequest) -> Program:
    """The program of a parameter."""
    if name == "ours-tcp":
        return Program(name, (request.getfixturevalue("our_program"),), speaks_secret=True, tcp=True)
    if name == "reference-tcp":
        return Program(name, (request.getfixturevalue("reference_program"),), speaks_secret=False, tcp=True)
    return request.getfixturevalue(name)


@pytest.fixture(params=BOTH)
def program(request: pytest.FixtureRequest) -> Program:
    """The daemon under test."""
    return resolve(request.param, request)


@pytest.fixture(params=OURS)
def our(request: pytest.FixtureRequest) -> Program:
    """Our daemon under test, where upstream is known to differ."""
    return resolve(request.param, request)


@pytest.fixture
def other(program: Program, request: pytest.FixtureRequest) -> Program:
    """What the daemon under test talks to: the reference, or ours where that cannot run."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        return request.getfixturevalue("reference")
    return request.getfixturevalue("ours")


Start = Callable[..., Daemon]


@contextmanager
def starting(folder: Path) -> Iterator[Start]:
    """What starts daemons, called like Daemon without the folder; they end with the context."""
    running: list[Daemon] = []

    def start_one(program: Program, *args: str, **options) -> Daemon:
        daemon = Daemon(program, folder, *args, ready=False, **{k: v for k, v in options.items() if k != "ready"})
        running.append(daemon)
        if options.get("ready", True):
            daemon.wait_ready()
        return daemon

    try:
        yield start_one
    finally:
        for daemon in running:
            daemon.kill()


@pytest.fixture
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start daemons that end with the test."""
    # Not below tmp_path: the path of a Unix socket may have a hundred characters.
    with starting(tmp_path_factory.mktemp("s")) as start_one:
        yield start_one


LONG_SECONDS = 65.0  # more than anything else here has a limit of, which is a minute
LongCalls = tuple[float, list[tuple[Persistent, Any, Persistent, Any]]]


@pytest.fixture(scope="session", autouse=True)
def long_calls(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LongCalls]:
    """Calls that nobody answers while all the other tests run: when they began; handler, its call, caller and id of each."""
    waiting = []
    with starting(tmp_path_factory.mktemp("s")) as start:
        try:
            programs = [resolve(name, request) for name in BOTH]
        except pytest.skip.Exception:  # where the reference cannot run, ours are tested all the same
            programs = [resolve(name, request) for name in OURS]
        for program in programs:
            tested, peer = start(program), start(programs[-1])
            tested.connect_to(peer)
            for calling, called in ((tested, peer), (peer, tested)):
                handler, caller = serve(called), calling.persistent()
                call_id = caller.start_call(called.peer_id, NAME)
                waiting.append((handler, handler.next_call(), caller, call_id))
        yield time.monotonic(), waiting


@pytest.fixture
def daemon(program: Program, start: Start) -> Daemon:
    return start(program)


@pytest.fixture
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short path, for Unix sockets."""
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def pair(program: Program, other: Program, start: Start) -> tuple[Daemon, Daemon]:
    """The daemon under test and another one, connected."""
    tested, peer = start(program), start(other)
    tested.connect_to(peer)
    return tested, peer
