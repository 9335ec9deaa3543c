"""Network namespaces of Linux, joined by cables and routers as a test needs them.

Knows how to make and remove them, and why they cannot be had here. Does not know who talks through them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys

_COMMAND_S = 30
# What a kernel says that lacks a part, or a container that may not use it.
_FORBIDDEN = (
    "not permitted",
    "not supported",
    "Permission denied",
    "Unknown device type",
    "No such file",
    "can't initialize",
)


class NoNetworks(Exception):
    """Namespaces cannot be made here; the message says what is missing."""


class Networks:
    """Namespaces with names of their own. A with block, or `close`, removes them."""

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise NoNetworks("network namespaces exist on Linux only")
        if os.geteuid() != 0:
            raise NoNetworks("making network namespaces needs the rights of root")
        if shutil.which("ip") is None:
            raise NoNetworks("the program ip, of the package iproute2, is not installed")
        self._prefix = f"p2pd-{os.getpid()}-{secrets.token_hex(2)}"
        self._names: list[str] = []

    def namespace(self, name: str) -> str:
        """A computer without any network but its loopback."""
        full = f"{self._prefix}-{name}"
        self._run("ip", "netns", "add", full)
        self._names.append(full)
        self._run("ip", "-n", full, "link", "set", "lo", "up")
        return full

    def cable(self, one: str, one_address: str, two: str, two_address: str) -> None:
        """Join two namespaces; addresses as 10.0.0.1/24."""
        ends = [f"e{secrets.token_hex(4)}" for _ in range(2)]
        self._run("ip", "-n", one, "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", two)
        for namespace, end, address in ((one, ends[0], one_address), (two, ends[1], two_address)):
            self._run("ip", "-n", namespace, "address", "add", address, "dev", end)
            self._run("ip", "-n", namespace, "link", "set", end, "up")

    def default_route(self, namespace: str, gateway: str) -> None:
        self._run("ip", "-n", namespace, "route", "add", "default", "via", gateway)

    def forward(self, namespace: str) -> None:
        """Let a namespace pass on packets of others."""
        self._run(*self.inside(namespace), "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")

    def translate(self, namespace: str, inner: str) -> None:
        """Make a namespace the router of a home: connections of the inner network leave with its own address."""
        self.forward(namespace)
        if shutil.which("nft"):
            out = f"type nat hook postrouting priority srcnat; ip saddr {inner} masquerade;"
            into = f"type filter hook input priority filter; ct state new ip saddr != {inner} drop;"
            rules = f"add table ip home {{ chain out {{ {out} }}; chain into {{ {into} }}; }}"
            self._run(*self.inside(namespace), "nft", rules)
        elif shutil.which("iptables"):
            rule = ["-t", "nat", "-A", "POSTROUTING", "-s", inner, "-j", "MASQUERADE"]
            self._run(*self.inside(namespace), "iptables", *rule)
            rule = ["-A", "INPUT", "!", "-s", inner, "-m", "conntrack", "--ctstate", "NEW", "-j", "DROP"]
            self._run(*self.inside(namespace), "iptables", *rule)
        else:
            raise NoNetworks("neither nft nor iptables is installed, so there is no address translation")

    @staticmethod
    def inside(namespace: str) -> list[str]:
        """What to put before a command that is to run there."""
        return ["ip", "netns", "exec", namespace]

    def close(self) -> None:
        while self._names:
            subprocess.run(["ip", "netns", "delete", self._names.pop()], check=True, timeout=_COMMAND_S)

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_S)
        if done.returncode == 0:
            return
        says = f"{' '.join(command)} failed: {done.stderr.strip()}"
        if any(reason in done.stderr for reason in _FORBIDDEN):
            raise NoNetworks(says)
        raise AssertionError(says)  # a mistake of the test's own is nothing to skip

    def __enter__(self) -> Networks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
