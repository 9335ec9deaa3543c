"""Starting the real p2pd, and the reasons that a user reads when it does not start."""

import asyncio
import os
import socket
import subprocess
import sys
import textwrap

import psutil
import pytest
from free_ports import free_port

from petals_win.daemon.binary import find_p2pd
from petals_win.daemon.control import control_address, open_control, remove_control_socket
from petals_win.daemon.process import DaemonError, explain_start_failure, start_p2pd, start_timeout_s
from petals_win.errors import UserError

PIPES = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.STDOUT}
NOBODY = "QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"


def arguments(address, **flags):
    flags = {"listen": address, "idleTimeout": "30s", "hostAddrs": "/ip4/127.0.0.1/tcp/0", **flags}
    return [str(find_p2pd().path), *(f"-{name}={value}" for name, value in flags.items())]


async def run_until_ready(**flags):
    """Start p2pd; returns it with its lines, of which the last is the ready line or the reason why there is none."""
    address = control_address("p2pd", f"t{os.urandom(4).hex()}")
    child = await start_p2pd(*arguments(address, **flags), **PIPES)
    lines = []

    async def read():
        async for line in child.stdout:
            lines.append(line.decode().rstrip())
            if lines[-1].startswith("Peer ID:"):
                return

    await asyncio.wait_for(read(), 60)
    return address, child, lines


def reason(**flags) -> str:
    """What the user reads when p2pd is started with these flags."""

    async def main():
        _, child, lines = await run_until_ready(**flags)
        assert await asyncio.wait_for(child.wait(), 30) != 0
        return str(explain_start_failure(lines, "it ended at once"))

    return asyncio.run(main())


@pytest.mark.parametrize("control", ["tcp"] if sys.platform == "win32" else ["tcp", "unix"])
def test_it_starts_and_can_be_reached(control, monkeypatch):
    monkeypatch.setenv("PETALS_WIN_CONTROL", control)

    async def main():
        address, child, lines = await run_until_ready()
        [told] = [line.removeprefix("Control socket: ") for line in lines if line.startswith("Control socket: ")]
        assert told == address or control == "tcp"
        _, writer = await open_control(told)
        writer.close()
        child.terminate()
        await asyncio.wait_for(child.wait(), 30)
        remove_control_socket(address)

    asyncio.run(main())


def test_it_ends_with_its_killed_parent():
    program = f"""
        import asyncio, sys
        from petals_win.daemon.process import start_p2pd
        async def main():
            child = await start_p2pd(*{arguments(control_address("p2pd", "killed"))!r}, stdout=asyncio.subprocess.PIPE)
            while not (await child.stdout.readline()).startswith(b"Peer ID:"):
                pass
            print(child.pid, flush=True)
            await asyncio.sleep(600)
        asyncio.run(main())
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    with parent:
        assert parent.stdout is not None
        p2pd = psutil.Process(int(parent.stdout.readline()))
        assert p2pd.name().startswith("p2pd")
        parent.kill()
    psutil.wait_procs([p2pd], timeout=30)
    assert not p2pd.is_running()


def test_it_does_not_get_the_users_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("GOLOG_LOG_LEVEL", "ERROR")

    async def main():
        address, child, _ = await run_until_ready()
        environment = psutil.Process(child.pid).environ()
        child.kill()
        await child.wait()
        remove_control_socket(address)
        return environment

    environment = asyncio.run(main())
    assert "secret" not in environment.values() and environment["GOLOG_LOG_LEVEL"] == "ERROR"


def test_a_port_in_use():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"/ip4/127.0.0.1/tcp/{listener.getsockname()[1]}"
        assert "uses the port" in reason(hostAddrs=address)


def test_a_damaged_identity(tmp_path):
    (tmp_path / "identity").write_bytes(b"\xff\xff\xff junk")
    assert "identity file is damaged" in reason(id=tmp_path / "identity")


def test_peers_that_do_not_answer():
    peer = f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{NOBODY}"
    assert "None of the peers answered" in reason(b=1, dhtServer=1, bootstrapPeers=peer)


def test_an_address_that_is_none():
    assert "An address is wrong" in reason(hostAddrs="192.168.1.5")


def test_an_address_of_another_pc():
    assert "does not belong to this PC" in reason(hostAddrs="/ip4/192.0.2.1/tcp/4001")


def reason_of(program) -> str:
    async def main():
        try:
            child = await start_p2pd(str(program), **PIPES)
        except DaemonError as e:
            return str(e)
        output, _ = await child.communicate()
        return str(explain_start_failure(output.decode().splitlines(), "it ended at once"))

    return asyncio.run(main())


def test_a_missing_program(tmp_path):
    assert "A file is missing" in reason_of(tmp_path / "p2pd")


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows knows programs by their name, not by mode and magic number"
)
@pytest.mark.parametrize(
    "content, mode, words",
    [(b"\x7fELF for another processor", 0o755, "another kind of processor"), (b"", 0o644, "may not be run")],
)
def test_a_program_that_cannot_be_run(tmp_path, content, mode, words):
    (tmp_path / "p2pd").write_bytes(content)
    (tmp_path / "p2pd").chmod(mode)
    assert words in reason_of(tmp_path / "p2pd")


@pytest.mark.parametrize(
    "line, words",
    [
        ("[WinError 193] %1 is not a valid Win32 application", "another kind of processor"),
        (
            "[WinError 225] Operation did not complete successfully because the file contains a virus",
            "Windows Security",
        ),
        ("[WinError 5] Access is denied", "antivirus"),
        (
            "listen tcp4 0.0.0.0:31330: bind: Only one usage of each socket address is normally permitted.",
            "uses the port",
        ),
        (
            "listen tcp4 0.0.0.0:445: bind: An attempt was made in a way forbidden by its access permissions.",
            "reserves it",
        ),
    ],
)
def test_what_windows_says(line, words):
    """These sentences are Windows' own and cannot be provoked elsewhere."""
    message = str(explain_start_failure([line], "it ended at once"))
    assert words in message and line in message


def test_a_deadline_that_passed():
    message = str(explain_start_failure([], "Daemon failed to start in 15.0 seconds"))
    assert "15.0 seconds" in message and "PETALS_WIN_P2PD_TIMEOUT" in message and "printed nothing" in message


def test_the_deadline_can_be_set(monkeypatch):
    monkeypatch.delenv("PETALS_WIN_P2PD_TIMEOUT", raising=False)
    assert start_timeout_s(15) == 15
    monkeypatch.setenv("PETALS_WIN_P2PD_TIMEOUT", "120")
    assert start_timeout_s(15) == 120
    monkeypatch.setenv("PETALS_WIN_P2PD_TIMEOUT", "two minutes")
    with pytest.raises(UserError, match="two minutes"):
        start_timeout_s(15)
