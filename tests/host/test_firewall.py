"""What the rules of Windows' firewall mean for p2pd, and which are added. The rules are as Windows' registry holds them."""

import subprocess
import sys

import pytest

from petals_win.errors import UserError
from petals_win.host import firewall
from petals_win.host.firewall import add_commands, as_typed, judge, look, parse_rule, remove_command

P2PD = r"C:\Users\Jörg Müller\petals-win\bin\p2pd.exe"
ALLOW = rf"v2.30|Action=Allow|Active=TRUE|Dir=In|Protocol=6|Profile=Private|App={P2PD}|Name=p2pd.exe|Desc=p2pd.exe|Defer=User|"
# What Windows writes when its question is answered by Cancel.
BLOCK = rf"v2.30|Action=Block|Active=TRUE|Dir=In|Protocol=6|Profile=Public|Profile=Private|App={P2PD}|Name=p2pd.exe|"
OURS = rf"v2.31|Action=Allow|Active=TRUE|Dir=In|Profile=Domain|Profile=Private|App={P2PD}|Name=petals-win p2pd|"
BOTH = ("private", "domain")


def state(*texts, enabled=BOTH, program=P2PD):
    return judge([rule for text in texts if (rule := parse_rule(text))], program, enabled)


def test_without_a_rule_windows_lets_nobody_in():
    assert state() == "missing"
    assert state(enabled=()) == "off"


@pytest.mark.parametrize("rule", [ALLOW, OURS, OURS.replace("Profile=Domain|Profile=Private|", "")])
def test_a_rule_that_allows(rule):
    assert state(rule) == "allowed"
    assert state(rule, program=P2PD.upper()) == "allowed", "Windows does not tell capitals apart"


def test_a_rule_that_blocks_beats_one_that_allows():
    assert state(OURS, BLOCK) == state(BLOCK, OURS) == "blocked"


@pytest.mark.parametrize(
    "change",
    [
        ("Active=TRUE", "Active=FALSE"),
        ("Dir=In", "Dir=Out"),
        ("Protocol=6", "Protocol=17"),
        ("Profile=Private", "Profile=Public"),
        ("p2pd.exe|Name", "other.exe|Name"),
        ("Protocol=6|", "Protocol=6|LPort=80|"),
    ],
    ids=lambda change: change[1],
)
def test_rules_about_something_else_do_not_count(change):
    assert state(ALLOW.replace(*change)) == "missing"
    assert state(BLOCK.replace("Profile=Public|", "").replace(*change), OURS) == "allowed"


def test_programs_are_found_by_variables_too(monkeypatch):
    monkeypatch.setenv("SYSTEMDRIVE", "C:")
    assert state(ALLOW.replace("C:", "%SystemDrive%")) == ("allowed" if sys.platform == "win32" else "missing")
    assert state(ALLOW.replace("C:", "%SYSTEMDRIVE%")) == "allowed"


@pytest.mark.parametrize(
    "text", ["", "v2.30|", "v2.30|Action=Allow|Dir=In|Name=@FirewallAPI.dll,-1|", "rubbish", "|||=|"]
)
def test_rules_of_no_program_are_none(text):
    assert parse_rule(text) is None


def test_the_commands_as_they_are_typed(monkeypatch):
    monkeypatch.setenv("SYSTEMROOT", r"C:\Windows")
    delete, add = map(as_typed, add_commands(P2PD))
    assert delete == f'netsh advfirewall firewall delete rule name=all dir=in program="{P2PD}"'
    assert add == (
        'netsh advfirewall firewall add rule name="petals-win p2pd" dir=in action=allow '
        f'program="{P2PD}" profile="private,domain" enable=yes'
    )
    assert as_typed(remove_command()) == 'netsh advfirewall firewall delete rule name="petals-win p2pd" dir=in'
    assert add_commands(P2PD)[0][0] == r"C:\Windows\System32\netsh.exe", "not what lies in the current folder"


@pytest.fixture
def as_windows(monkeypatch):
    """A Windows without a firewall to change: what it is told is written down."""
    told = []

    def run(command, **_):
        told.append(command)
        return subprocess.CompletedProcess(command, 1 if "delete" in command else 0, b"", b"")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(firewall, "_is_administrator", lambda: True)
    return told


def test_allow_takes_old_rules_away_first(as_windows):
    firewall.allow(P2PD)
    assert ["delete" in as_windows[0], "add" in as_windows[1], len(as_windows)] == [True, True, 2]
    assert firewall.forget() is False, "netsh says that there was none"


def test_without_rights_nothing_is_changed(as_windows, monkeypatch):
    monkeypatch.setattr(firewall, "_is_administrator", lambda: False)
    for change, verb in ((lambda: firewall.allow(P2PD), "add"), (firewall.forget, "remove")):
        with pytest.raises(UserError, match=f"administrator.*petals-win firewall {verb}"):
            change()
    assert as_windows == []


def test_what_netsh_refuses_is_shown(as_windows, monkeypatch):
    answer = subprocess.CompletedProcess([], 1, b"The parameter is incorrect.\r\n", b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(UserError, match=r"The parameter is incorrect\. \(netsh advfirewall"):
        firewall.allow(P2PD)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows is where the firewall is known")
def test_other_systems_are_told_what_to_do():
    assert look(P2PD) is None
    with pytest.raises(UserError, match="Windows only"):
        firewall.allow(P2PD)


@pytest.mark.skipif(sys.platform != "win32", reason="Windows' registry holds the rules")
def test_the_rules_of_this_windows_can_be_read():
    assert look(r"C:\no such folder\p2pd.exe") in ("missing", "off")
    assert all(rule.program for rule in firewall._rules())
