"""Statements 11 to 19 and 60 to 62 of the conformance checklist: flags, start, the ready line, the end, log lines."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import p2pd_wire as wire
import psutil
import pytest
from conftest import Start
from free_ports import free_port
from p2pd_client import Closed, Daemon, Program

# What P2P.create passes, with its own defaults.
HIVEMIND = [
    "-autoRelay=0", "-autonat=1", "-b=0", "-connManager=1", "-idleTimeout=30.0s", "-natPortMap=0", "-relay=1",
    "-relayHopLimit=0", "-tls=1", "-persistentConnMaxMsgSize=4194304",
]  # fmt: skip
# The others that a daemon of upstream knows.
OTHERS = [
    "-quic=1", "-relayActive=0", "-relayHop=0", "-pubsub=0", "-pubsubRouter=gossipsub", "-pubsubSign=1",
    "-pubsubSignStrict=1", "-gossipsubHeartbeatInterval=1s", "-gossipsubHeartbeatInitialDelay=1s", "-pprof=0",
    "-pprofPort=0", "-metricsAddr=", "-muxer=yamux", "-noise=1", "-connLo=256", "-connHi=512", "-connGrace=120s",
    "-relayService=1", "-relayDataLimit=4294967296", "-relayTimeLimit=30m", "-relayDiscovery=1", "--q=0",
]  # fmt: skip
NOBODY = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWD3bfmNbuuuVCYwkjnFt3ukm3qaB3hDED3peHHXawvRAi"


def ends(daemon: Daemon, timeout_s: float = 20) -> int:
    code = daemon.wait(timeout_s)
    daemon.output()
    return code


def test_11_every_flag_parses(program: Program, start: Start) -> None:
    daemon = start(program, *HIVEMIND, *OTHERS)
    assert daemon.identify()[0] == daemon.peer_id


@pytest.mark.parametrize("mode", ["-dht=1", "-dhtClient=1", "-dhtServer=1", "-forceReachabilityPrivate=true"])
def test_11_each_mode_parses(program: Program, start: Start, mode: str) -> None:
    daemon = start(program, mode, dht=None)
    assert daemon.identify()[0] == daemon.peer_id


def test_11_unknown_flag_is_refused(program: Program, start: Start) -> None:
    daemon = start(program, "-nonsense=1", ready=False)
    assert ends(daemon) == 2


def test_12_one_ready_line(program: Program, other: Program, start: Start) -> None:
    first = start(other)
    daemon = start(program, "-b=1", f"-bootstrapPeers={first.full_addresses()[0]}")
    # At this moment the swarm has been joined and the control socket answers.
    assert [peer for peer, _ in daemon.peers()] == [first.peer_id]
    daemon.wait_line("Bootstrap peers:")
    lines = daemon.lines
    assert sum(line.startswith("Peer ID: ") for line in lines) == 1
    assert lines[0].startswith("Control socket: ") and lines[1].startswith("Peer ID: ") and lines[2] == "Peer Addrs:"
    assert lines[3] in daemon.identify()[1]


def test_13_no_bootstrap_peer_is_fatal(program: Program, start: Start) -> None:
    daemon = start(program, "-b=1", f"-bootstrapPeers={NOBODY}", ready=False)
    assert ends(daemon, 70) not in (0, None)
    assert re.search("bootstrap", daemon.output()[-1], re.IGNORECASE)


def test_13_the_reason_names_the_address(our: Program, start: Start) -> None:
    daemon = start(our, "-b=1", f"-bootstrapPeers={NOBODY}", ready=False)
    assert ends(daemon, 70) == 1
    assert NOBODY in daemon.output()[-1] and "refused" in daemon.output()[-1]


def test_13_one_bootstrap_peer_is_enough(program: Program, other: Program, start: Start) -> None:
    first = start(other)
    daemon = start(program, "-b=1", f"-bootstrapPeers={NOBODY},{first.full_addresses()[0]}")
    assert first.peer_id in [peer for peer, _ in daemon.peers()]


def test_14_addresses(program: Program, start: Start) -> None:
    assert start(program, listen=None).identify()[1] == []
    assert start(program, "-noListenAddrs=1").identify()[1] == []
    announced = ["/ip4/192.0.2.1/tcp/1", "/dns4/example.org/tcp/2"]
    assert sorted(start(program, f"-announceAddrs={','.join(announced)}").identify()[1]) == sorted(announced)


def test_15_idle_timeout(program: Program, start: Start) -> None:
    daemon = start(program, "-idleTimeout=5s")
    daemon.identify()  # a plain connection does not count
    assert ends(daemon) == 0
    assert not control_file(daemon)


def test_16_the_last_persistent_connection(program: Program, start: Start) -> None:
    daemon = start(program, "-idleTimeout=5s")
    first, second = daemon.persistent(), daemon.persistent()
    first.close()
    with pytest.raises(subprocess.TimeoutExpired):
        daemon.wait(6)  # longer than the idle timeout: the first client has stopped it
    second.close()
    assert ends(daemon) == 0
    assert not control_file(daemon)


def control_file(daemon: Daemon) -> bool:
    return daemon.control.startswith("/unix") and Path(daemon.control.removeprefix("/unix")).exists()


# A shell between the test and the daemon: the daemon's parent, which can be killed.
SHELL = ["/bin/sh", "-c", '"$@" & echo "child $!"; wait', "sh"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no /bin/sh to be the daemon's parent")
@pytest.mark.parametrize("held", [False, True], ids=["alone", "with another client"])
def test_17_death_of_the_parent(program: Program, start: Start, held: bool) -> None:
    if held and not program.speaks_secret:
        pytest.skip("upstream's daemon does not watch its parent: it lives while any client does")
    daemon = start(program, prefix=SHELL)
    child = psutil.Process(int(daemon.wait_line("child ").split()[1]))
    persistent = daemon.persistent()
    daemon.process.kill()
    if not held:
        persistent.close()  # as the kernel does for a parent that held it
    _, alive = psutil.wait_procs([child], timeout=30)
    persistent.close()
    assert not alive


def test_17_end_of_standard_input(our: Program, start: Start) -> None:
    daemon = start(our, env={"PETALS_WIN_P2PD_STDIN": "1"}, stdin=subprocess.PIPE)
    assert daemon.identify()[0] == daemon.peer_id
    assert daemon.process.stdin is not None
    daemon.process.stdin.close()
    assert ends(daemon) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send to another process")
def test_18_sigterm(program: Program, start: Start) -> None:
    daemon = start(program)
    daemon.persistent()
    daemon.process.terminate()
    # Upstream's exit code is a race between its own exit and the signal.
    assert ends(daemon) in ((0,) if program.speaks_secret else (0, -signal.SIGTERM, 143))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send to another process")
def test_18_sigterm_is_clean(our: Program, start: Start) -> None:
    daemon = start(our)
    daemon.persistent()
    daemon.process.terminate()
    assert ends(daemon) == 0
    assert not control_file(daemon)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send to one process")
def test_18_sigint_is_for_the_client(our: Program, start: Start) -> None:
    daemon = start(our)
    persistent = daemon.persistent()
    daemon.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert daemon.identify()[0] == daemon.peer_id
    persistent.close()
    assert ends(daemon) == 0


def test_19_log_lines(program: Program, start: Start) -> None:
    first = start(program, env={"GOLOG_LOG_LEVEL": "debug"})
    second = start(program, "-b=1", f"-bootstrapPeers={first.full_addresses()[0]}", env={"GOLOG_LOG_LEVEL": "debug"})
    persistent = second.persistent()
    assert persistent.call(first.peer_id, "nobody").error
    persistent.close()
    ends(second)
    lines = [line for line in second.output() if '"logger"' in line]
    assert lines
    for line in lines:
        entry = json.loads(line)
        assert {"level", "ts", "caller", "msg"} <= set(entry), line
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,6}(Z|[+-]\d{4})", entry["ts"]), line


def test_60_tcp_control_socket(our_program: str, start: Start) -> None:
    daemon = start(Program("ours-tcp", (our_program,), speaks_secret=True, tcp=True))
    port = int(daemon.control.rsplit("/", 1)[1])
    assert daemon.control.startswith("/ip4/127.0.0.1/tcp/") and port > 0  # port 0 was asked for
    assert daemon.identify()[0] == daemon.peer_id
    chosen = f"/ip4/127.0.0.1/tcp/{free_port()}"
    named = start(Program("ours-tcp", (our_program,), speaks_secret=True, tcp=True), control=chosen)
    assert named.control == chosen and named.identify()[0] == named.peer_id


def test_61_only_loopback_is_listened_on(our: Program, start: Start) -> None:
    listen = "/ip4/127.0.0.1/tcp/0,/ip4/127.0.0.1/udp/0/quic-v1"
    daemon = start(our, "-autonat=1", "-connManager=1", listen=listen)
    sockets = psutil.Process(daemon.process.pid).net_connections("inet")
    listening = [
        c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN or c.type == socket.SOCK_DGRAM and c.laddr
    ]
    assert listening and set(listening) == {"127.0.0.1"}


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows does not close a pipe while a thread waits for its output"
)
def test_62_output_through_a_pipe(our: Program, start: Start) -> None:
    daemon = start(our, "-idleTimeout=5s", env={"GOLOG_LOG_LEVEL": "debug"})
    assert not any("\r" in line for line in daemon.lines)
    # Nobody reads any more; the daemon logs at every step, and must still answer and leave in order.
    assert daemon.process.stdout is not None
    os.dup2(os.open(os.devnull, os.O_RDONLY), daemon.process.stdout.fileno())
    persistent = daemon.persistent()
    for _ in range(20):
        assert persistent.call(daemon.peer_id, "itself").error
    persistent.close()
    assert daemon.wait(60) == 0
    assert not control_file(daemon)


def test_62_a_connection_cut_at_once(daemon: Daemon) -> None:
    for _ in range(20):
        daemon.connect().reset()
    with pytest.raises(Closed), daemon.connect() as connection:
        connection.send(b"")
        connection.receive()
    assert wire.one(daemon.ask(wire.IDENTIFY), 4, 1) == daemon.peer_id
