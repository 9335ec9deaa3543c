"""This PC's side of the network: p2pd, ports, the firewall.

Knows what a node and the API listen with. Does not know other PCs.
"""

from __future__ import annotations

from collections.abc import Iterator

from petals_win.daemon.binary import find_p2pd, version_of
from petals_win.doctor.findings import Asked, Finding
from petals_win.errors import UserError
from petals_win.host import firewall
from petals_win.host.ports import check_port_free

_API_PORT = 8000


def check_p2pd(_asked: Asked) -> Iterator[Finding]:
    """Whether there is a p2pd, and whether the system runs it."""
    found = find_p2pd()
    yield Finding("ok", f"{version_of(found.path)} ({found.path})")


def check_ports(asked: Asked) -> Iterator[Finding]:
    if asked.port is not None:
        check_port_free("0.0.0.0", asked.port)
        yield Finding("ok", f"Port {asked.port} is free for a node")
    try:
        check_port_free("127.0.0.1", _API_PORT)
    except UserError as e:
        text = str(e).partition(". ")[0]
        yield Finding("warning", text, "If that is no API of petals-win, use petals-win api --port with another one.")
    else:
        yield Finding("ok", f"Port {_API_PORT} is free for the API")


def check_firewall(_asked: Asked) -> Iterator[Finding]:
    program = find_p2pd().path
    state = firewall.look(program)
    if state is None:
        yield Finding("ok", "No Windows firewall here; if there is another one, it must let p2pd in")
    elif state in ("allowed", "off"):
        yield Finding("ok", "Windows' firewall lets p2pd in" if state == "allowed" else "Windows' firewall is off")
    else:
        blocks = "blocks p2pd" if state == "blocked" else "has no rule that lets p2pd in"
        typed = " and then ".join(firewall.as_typed(command) for command in firewall.add_commands(program))
        yield Finding(
            "error" if state == "blocked" else "warning",
            f"Windows' firewall {blocks}: other PCs cannot reach this one",
            f"As an administrator type: petals-win firewall add (it runs {typed})",
        )
