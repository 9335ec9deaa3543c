"""The commands around Windows' firewall, on systems that have it and on those that have not."""

import sys

import pytest
from typer.testing import CliRunner

from petals_win.cli.firewall import app
from petals_win.errors import UserError
from petals_win.host import firewall


def test_add_names_the_program_and_what_may_still_be_in_the_way(monkeypatch, tmp_path):
    p2pd = tmp_path / "p2pd.exe"
    p2pd.write_bytes(b"")
    p2pd.chmod(0o755)
    monkeypatch.setenv("PETALS_WIN_P2PD", str(p2pd))
    monkeypatch.setattr(firewall, "check_system", lambda: None)
    allowed = []
    monkeypatch.setattr(firewall, "allow", allowed.append)
    done = CliRunner().invoke(app, ["add"])
    assert done.exit_code == 0 and allowed == [p2pd]
    assert str(p2pd) in done.output.replace("\n", "") and "Private network" in done.output


@pytest.mark.parametrize("there_was_one", [True, False])
def test_remove_says_whether_there_was_a_rule(monkeypatch, there_was_one):
    monkeypatch.setattr(firewall, "forget", lambda: there_was_one)
    done = CliRunner().invoke(app, ["remove"])
    assert done.exit_code == 0
    assert ("The rule is gone" in done.output) == there_was_one


@pytest.mark.skipif(sys.platform == "win32", reason="Windows is where the firewall is known")
@pytest.mark.parametrize("command", ["add", "remove"])
def test_elsewhere_it_says_what_to_do(command):
    done = CliRunner().invoke(app, [command])
    assert isinstance(done.exception, UserError) and "Windows only" in str(done.exception)
