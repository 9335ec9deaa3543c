"""Starting p2pd, and saying why it did not start.

Knows its environment, its messages and what usually stands in its way. Does not know its arguments.
"""

import asyncio
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from petals_win.daemon.control import daemon_secret
from petals_win.errors import UserError
from petals_win.host.children import start_child

logger = logging.getLogger(__name__)

# The daemon faces the network: it gets what it needs to run, and none of the user's tokens and keys.
_NEEDED = re.compile(
    r"PATH|HOME|USERPROFILE|SYSTEMROOT|WINDIR|SYSTEMDRIVE|TMPDIR|TEMP|TMP|LOCALAPPDATA|LANG|TZ"
    r"|XDG_RUNTIME_DIR|GO[A-Z_0-9]*|LIBP2P_\w+|PETALS_WIN_\w+",
    re.IGNORECASE,
)

# What the system or the daemon says, in English since neither is translated by Go, and what to do about it.
_CAUSES = [
    (
        r"bind: address already in use|Only one usage of each socket address|10048",
        "Another program, perhaps another node, uses the port. Choose another one with --port.",
    ),
    (
        r"cannot assign requested address|requested address is not valid in its context",
        "That address does not belong to this PC. Leave the host out, or use an address of this PC.",
    ),
    (
        r"bind: permission denied|forbidden by its access permissions",
        "This user may not listen on that port, or the system reserves it. Choose one between 20000 and 40000 with --port.",
    ),
    (
        r"bootstrap",
        "None of the peers answered. Check that the first PC still runs and shows the same address, that both PCs are on "
        "one network, and that its firewall lets petals-win in.",
    ),
    (
        r"multiaddr|invalid p2p|must begin with /",
        "An address is wrong. Copy the whole line that the first PC printed; a peer looks like "
        "/ip4/192.168.1.5/tcp/31330/p2p/12D3…",
    ),
    (
        r"wire-format|private key|unmarshal|illegal tag",
        "The identity file is damaged. Delete it: the next start makes a new one.",
    ),
    (
        r"exec format error|cannot execute binary|WinError 193|WinError 216",
        "The file is for another kind of processor or system. Reinstall petals-win, or set PETALS_WIN_P2PD to the right one.",
    ),
    (
        r"WinError 225|WinError 1260|WinError 4551|operation did not complete successfully because the file contains a virus",
        "Windows Security or a policy of this PC blocked it. Allow the file there, then try again.",
    ),
    (
        r"permission denied|WinError 5\b",
        "The file may not be run: chmod +x it, or, on Windows, look whether an antivirus program has locked it.",
    ),
    (
        r"no such file or directory|WinError 2\b",
        "A file is missing, possibly removed by an antivirus program. Reinstall petals-win.",
    ),
]


class DaemonError(UserError):
    """p2pd did not start, or was lost."""


class DaemonLost(DaemonError):
    """p2pd has ended while this process needed it; the message is `explain_end`'s."""


def start_timeout_s(default: float) -> float:
    """Seconds that p2pd has to become ready: PETALS_WIN_P2PD_TIMEOUT, or else `default`."""
    text = os.environ.get("PETALS_WIN_P2PD_TIMEOUT", "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        raise UserError(
            f"PETALS_WIN_P2PD_TIMEOUT is {text!r}. Set it to a number of seconds, such as 60, or unset it."
        )
    return seconds


async def start_p2pd(
    *argv: str,
    env: Mapping[str, str] | None = None,
    stdin: int | None = asyncio.subprocess.PIPE,
    stdout: int | None = None,
    stderr: int | None = None,
) -> asyncio.subprocess.Process:
    """Start p2pd as a child that ends with this process; raises DaemonError when the system does not run it.

    Called like asyncio.create_subprocess_exec. Of `env`, or else of this process's environment, the child gets only what
    it needs. The caller keeps the result: with it goes the pipe whose end tells the daemon to leave.
    """
    environment = {name: value for name, value in (env or os.environ).items() if _NEEDED.fullmatch(name)}
    environment["PETALS_WIN_P2PD_SECRET"] = daemon_secret()
    if stdin == asyncio.subprocess.PIPE:
        environment["PETALS_WIN_P2PD_STDIN"] = "1"  # it leaves when the pipe ends
    try:
        return await start_child(*argv, env=environment, stdin=stdin, stdout=stdout, stderr=stderr)
    except OSError as e:
        raise explain_start_failure([str(e)], f"{argv[0]} cannot be run") from e


def explain_end(status: int, last_lines: Iterable[str]) -> str:
    """What to tell the user when p2pd, which had been ready, has ended by itself or by others.

    :param status: exit status; on POSIX minus the number of the signal that ended it
    :param last_lines: of what it printed
    """
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    fatal = next((line for line in last_lines if line.startswith(("panic:", "fatal error:"))), None)
    said = f" It said: {fatal.strip()}." if fatal else ""
    return (
        f"The peer-to-peer daemon p2pd has ended {how}, and without it nothing goes on.{said} Start petals-win again; "
        "if that happens again, look whether an antivirus program or a lack of memory ended it."
    )


def explain_start_failure(output_lines: Sequence[str], happened: str) -> DaemonError:
    """What to tell the user when p2pd did not become ready.

    :param output_lines: what it printed, oldest first; a fatal reason is its last line
    :param happened: what was seen, e.g. "it ended at once" or that a deadline passed
    """
    output = [line for line in output_lines if line.strip()]
    for line in output:
        logger.debug("p2pd: %s", line)
    said = f" Its last output: {output[-1].strip()}." if output else " It printed nothing."
    for line in output[-1:-6:-1]:
        for pattern, advice in _CAUSES:
            if re.search(pattern, line, re.IGNORECASE):
                return DaemonError(f"The peer-to-peer daemon did not start: {happened.rstrip('.')}.{said} {advice}")
    advice = "If this PC is slow or busy, set PETALS_WIN_P2PD_TIMEOUT to the seconds to wait, such as 120."
    return DaemonError(f"The peer-to-peer daemon did not start: {happened.rstrip('.')}.{said} {advice}")
