"""The local sockets between Python and p2pd."""

import asyncio
import hashlib
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from petals_win.daemon.control import (
    control_address,
    daemon_secret,
    open_control,
    remove_control_socket,
    serve_control,
)
from petals_win.host.folders import run_folder

KINDS = ["tcp"] if sys.platform == "win32" else ["tcp", "unix"]
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows Python has no Unix sockets")


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    if request.param == "tcp":
        monkeypatch.setenv("PETALS_WIN_CONTROL", "tcp")
    else:
        monkeypatch.delenv("PETALS_WIN_CONTROL", raising=False)
    return request.param


@pytest.fixture
def unix(monkeypatch):
    monkeypatch.delenv("PETALS_WIN_CONTROL", raising=False)


async def connect_as_p2pd(address):
    """Open a client's listener as the daemon does."""
    if address.startswith("/unix/"):
        return await asyncio.open_unix_connection(address.removeprefix("/unix"))
    reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rsplit("/", 1)[1]))
    label = "petals-win p2pd stream handler\n"
    writer.write(hashlib.sha256((label + daemon_secret()).encode()).hexdigest().encode())
    return reader, writer


async def echo(reader, writer):
    writer.write(await reader.readexactly(4))
    await writer.drain()
    writer.close()


def test_what_is_served_can_be_opened(kind):
    async def main():
        async with serve_control(control_address("p2pclient", "a-b_c"), echo) as address:
            assert address.startswith("/unix/" if kind == "unix" else "/ip4/127.0.0.1/tcp/")
            assert not address.endswith("/tcp/0")
            reader, writer = await connect_as_p2pd(address)
            writer.write(b"ping")
            assert await asyncio.wait_for(reader.read(), 30) == b"ping"
            writer.close()
            await writer.wait_closed()
        with pytest.raises(OSError):
            await open_control(address)

    asyncio.run(main())


def test_the_end_does_not_wait_for_connections(kind):
    async def hold(reader, writer):
        held.set()
        await asyncio.sleep(600)

    async def main():
        async with serve_control(control_address("p2pclient", "x"), hold) as address:
            _, writer = await connect_as_p2pd(address)
            await asyncio.wait_for(held.wait(), 30)
        writer.close()

    held = asyncio.Event()
    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("opening", [b"", b"ping", b"0" * 64, "the client's own"])
def test_a_tcp_connection_without_the_daemons_secret_is_closed_and_logged(opening, monkeypatch, caplog):
    monkeypatch.setenv("PETALS_WIN_CONTROL", "tcp")
    shown = opening if isinstance(opening, bytes) else daemon_secret().encode()

    async def main():
        async with serve_control(control_address("p2pclient", "x"), echo) as address:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(address.rsplit("/", 1)[1]))
            writer.write(shown)
            if len(shown) < 64:
                writer.write_eof()
            assert await asyncio.wait_for(reader.read(), 30) == b""
            writer.close()

    asyncio.run(main())
    assert "did not open with the secret" in caplog.text and daemon_secret() not in caplog.text


@pytest.mark.parametrize("address", ["/ip4/192.0.2.1/tcp/80", "/ip4/127.0.0.1/udp/80", "p2pd.sock"])
def test_other_addresses_are_refused(address):
    with pytest.raises(ValueError, match="no local socket"):
        asyncio.run(open_control(address))


@posix_only
def test_unix_sockets_are_out_of_others_reach(unix):
    path = Path(control_address("p2pd", "abc").removeprefix("/unix"))
    assert path.parent == run_folder() and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.name == f"p2pd-{os.getpid()}-abc.sock"


@posix_only
def test_a_deep_home_does_not_make_the_path_too_long(unix, monkeypatch, tmp_path):
    monkeypatch.setenv("PETALS_WIN_HOME", str(tmp_path / ("deep" * 30)))
    address = control_address("p2pclient", "A1b2C3d4E5f")
    path = address.removeprefix("/unix")
    assert len(os.fsencode(path)) <= 103
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
    remove_control_socket(address)
    remove_control_socket(address)  # again does no harm
    assert not os.path.exists(path)


@posix_only
def test_sockets_of_dead_processes_are_cleaned_away(unix):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(60)
    stale = run_folder() / f"p2pd-{gone.pid}-abc.sock"
    alive = run_folder() / f"p2pd-{os.getpid()}-def.sock"
    foreign = run_folder() / "somebody.sock"
    for path in (stale, alive, foreign):
        path.touch()
    control_address("p2pd", "abc")
    assert not stale.exists() and alive.exists() and foreign.exists()
