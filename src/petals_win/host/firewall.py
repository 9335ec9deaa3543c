"""Whether Windows' firewall lets other PCs reach a program, and the rule that makes it so.

Knows where Windows keeps its rules and how they read: not by netsh, which answers in the language of the system. Does not know
what the program is. Changes nothing by itself; `allow` and `forget` need an administrator.
"""

from __future__ import annotations

import ntpath
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from petals_win.errors import UserError

RULE = "petals-win p2pd"
State = Literal["allowed", "blocked", "missing", "off"]

_SERVICE = r"SYSTEM\CurrentControlSet\Services\SharedAccess\Parameters\FirewallPolicy"
_POLICY = r"SOFTWARE\Policies\Microsoft\WindowsFirewall"  # of an organisation; its rules count, too
_HOME_PROFILES = {"private": "StandardProfile", "domain": "DomainProfile"}
_TCP = "6"
_NETSH_SECONDS = 30
_CODE_PAGE = "oem" if sys.platform == "win32" else "utf-8"


@dataclass(frozen=True)
class Rule:
    """An inbound rule for one program, as far as it matters here."""

    name: str
    action: Literal["allow", "block"]
    program: str
    profiles: frozenset[str]  # "private", "public", "domain"; empty: all
    protocol: str | None  # a number; None: any
    active: bool


def parse_rule(text: str) -> Rule | None:
    """A rule as the registry has it, e.g. "v2.30|Action=Allow|Active=TRUE|Dir=In|…".

    None for one that is outbound, or of no program, or of single ports: p2pd's port is another at every start.
    """
    fields = [(name, value) for name, _, value in (part.partition("=") for part in text.split("|")[1:])]
    values = dict(fields)
    action = values.get("Action", "").lower()
    if values.get("Dir") != "In" or "App" not in values or "LPort" in values or action not in ("allow", "block"):
        return None
    return Rule(
        name=values.get("Name", ""),
        action="allow" if action == "allow" else "block",
        program=values["App"],
        profiles=frozenset(value.lower() for name, value in fields if name == "Profile"),
        protocol=values.get("Protocol"),
        active=values.get("Active", "").upper() == "TRUE",
    )


def judge(rules: Iterable[Rule], program: Path | str, enabled: Iterable[str]) -> State:
    """What the rules mean for TCP connections from a home network to `program`.

    :param enabled: those of the profiles "private" and "domain" for which the firewall is on
    """
    enabled = set(enabled)
    if not enabled:
        return "off"
    relevant = [
        rule
        for rule in rules
        if rule.active
        and rule.protocol in (None, _TCP)
        and _same_file(rule.program, str(program))
        and (not rule.profiles or rule.profiles & enabled)
    ]
    # A rule that blocks beats any that allow.
    if any(rule.action == "block" for rule in relevant):
        return "blocked"
    open_on = {profile for rule in relevant for profile in rule.profiles or enabled}
    return "allowed" if "private" in open_on or not enabled - open_on else "missing"


def look(program: Path | str) -> State | None:
    """The state of this PC's firewall for `program`; None on systems whose firewall is not known here."""
    if sys.platform != "win32":
        return None
    return judge(_rules(), program, [profile for profile in _HOME_PROFILES if _is_on(_HOME_PROFILES[profile])])


def add_commands(program: Path | str) -> list[list[str]]:
    """What lets other PCs of a home network reach `program`: first away with its rules, which may block it, then the rule."""
    return [
        [_netsh(), "advfirewall", "firewall", "delete", "rule", "name=all", "dir=in", f"program={program}"],
        [
            *(_netsh(), "advfirewall", "firewall", "add", "rule", f"name={RULE}", "dir=in", "action=allow"),
            *(f"program={program}", "profile=private,domain", "enable=yes"),
        ],
    ]


def remove_command() -> list[str]:
    """What takes the rule away again."""
    return [_netsh(), "advfirewall", "firewall", "delete", "rule", f"name={RULE}", "dir=in"]


def as_typed(command: list[str]) -> str:
    """A command as it is typed in cmd and PowerShell."""
    words = [ntpath.basename(command[0]).removesuffix(".exe")]
    for word in command[1:]:
        name, equals, value = word.partition("=")
        quoted = f'"{value}"' if re.search(r"[ ,&()]", value) else value
        words.append(name + equals + quoted)
    return " ".join(words)


def allow(program: Path | str) -> None:
    """Add the rule. Raises UserError without an administrator's rights, and where there is no such firewall."""
    _check_may_change("add")
    delete, add = add_commands(program)
    _run(delete, may_find_none=True)
    _run(add)


def forget() -> bool:
    """Take the rule away; whether there was one. Raises UserError as `allow` does."""
    _check_may_change("remove")
    return _run(remove_command(), may_find_none=True)


def check_system() -> None:
    """Raise a UserError, which says what to do instead, where the firewall is not Windows'."""
    if sys.platform == "win32":
        return
    how = (
        "macOS asks when p2pd first runs: choose Allow; later, System Settings > Network > Firewall."
        if sys.platform == "darwin"
        else "If this PC has a firewall, open the port that 'petals-win serve --port' was given, e.g. sudo ufw allow 31330/tcp."
    )
    raise UserError(f"petals-win changes the firewall of Windows only. {how}")


def _check_may_change(verb: str) -> None:
    check_system()
    if not _is_administrator():
        raise UserError(
            "Only an administrator may change the firewall. Right-click the Start button, choose Terminal (Admin) or "
            f"PowerShell (Admin), and type there: petals-win firewall {verb}"
        )


def _is_administrator() -> bool:
    if sys.platform != "win32":
        return False
    import ctypes

    return bool(ctypes.windll.shell32.IsUserAnAdmin())


def _run(command: list[str], may_find_none: bool = False) -> bool:
    try:
        done = subprocess.run(command, capture_output=True, timeout=_NETSH_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise UserError(f"Windows did not change its firewall: {e}. Type it yourself: {as_typed(command)}") from e
    # netsh answers 1 both for "there is no such rule" and for errors, in the language and code page of the system.
    if done.returncode != 0 and not may_find_none:
        said = done.stdout.decode(_CODE_PAGE, "replace").strip()
        raise UserError(f"Windows did not change its firewall: {said or 'no reason given'} ({as_typed(command)})")
    return done.returncode == 0


def _netsh() -> str:
    # By its full path: an administrator must not run what lies in the current folder under that name.
    return ntpath.join(os.environ.get("SYSTEMROOT", r"C:\Windows"), "System32", "netsh.exe")


def _same_file(rule_path: str, path: str) -> bool:
    return ntpath.normcase(ntpath.expandvars(rule_path)) == ntpath.normcase(path)


if sys.platform == "win32":
    import winreg

    def _rules() -> Iterable[Rule]:
        for place in (_SERVICE, _POLICY):
            try:
                key = winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, rf"{place}\FirewallRules")
            except FileNotFoundError:
                continue
            with key:
                for index in range(winreg.QueryInfoKey(key)[1]):
                    _, value, kind = winreg.EnumValue(key, index)
                    rule = parse_rule(value) if kind == winreg.REG_SZ else None
                    if rule is not None:
                        yield rule

    def _is_on(profile: str) -> bool:
        for place in (_POLICY, _SERVICE):  # the organisation's word counts
            try:
                with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, rf"{place}\{profile}") as key:
                    return winreg.QueryValueEx(key, "EnableFirewall")[0] == 1
            except FileNotFoundError:
                continue
        return False

else:

    def _rules() -> Iterable[Rule]:
        raise NotImplementedError("Windows alone has these rules")

    def _is_on(profile: str) -> bool:
        raise NotImplementedError("Windows alone has these profiles")
