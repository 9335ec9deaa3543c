"""`petals-win patches` on a made-up checkout."""

import json

import pytest
from typer.testing import CliRunner

from petals_win.cli.patches import app
from petals_win.errors import UserError
from petals_win.upstream import build as building

BODY = '@replace("alpha:f", digest="?")\ndef f():\n    return 2\n\n\nremove_module("alpha.old", digest="?")\n'


@pytest.fixture
def run(project, monkeypatch):
    """Run a command and return what it prints; errors for the user come through."""
    project.upstream("alpha/__init__.py", "def f():\n    return 1\n")
    project.upstream("alpha/old.py", "old = 1")
    project.patch("alpha/one.py", BODY)
    project.patch("beta/two.py", 'set_value("beta:BETA", "2", digest="?")\n')
    project.checkout.register.write_text(
        "# Title\n<!-- patches:begin -->\n<!-- patches:end -->\nEnd.\n", encoding="utf-8"
    )
    monkeypatch.setattr(building, "this_checkout", lambda: project.checkout)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_list(run):
    lines = run("list").splitlines()
    assert [line.split() for line in lines] == [
        ["alpha/one.py", "windows-only", "Change", "something."],
        ["beta/two.py", "windows-only", "Change", "something."],
    ]


def test_list_for_programs(run):
    first, second = json.loads(run("list", "--json"))
    assert first == {
        "name": "alpha/one.py",
        "subject": "Change something.",
        "why": "it fails on Windows",
        "status": "windows-only",
        "upstream_issue": "none",
        "drop_when": "never",
        "changes": [
            {"kind": "replace", "target": "alpha:f", "definition": "f"},
            {"kind": "remove_module", "target": "alpha.old"},
        ],
    }
    assert second["changes"] == [{"kind": "set_value", "target": "beta:BETA", "expression": "2"}]


@pytest.mark.parametrize("name", ["one", "alpha/one", "alpha/one.py", "patches/alpha/one.py"])
def test_show(run, name):
    assert run("show", name).splitlines() == [
        "name: alpha/one.py",
        "subject: Change something.",
        "why: it fails on Windows",
        "status: windows-only",
        "upstream issue: none",
        "drop when: never",
        "  replace alpha:f (f)",
        "  remove_module alpha.old",
    ]


def test_unknown_name(run):
    with pytest.raises(UserError, match="No patch is called three. Choose one of: alpha/one, beta/two."):
        run("show", "three")


def test_diff(run):
    one = (
        "--- a/alpha/__init__.py\n+++ b/alpha/__init__.py\n@@ -1,2 +1,2 @@\n def f():\n-    return 1\n+    return 2\n"
        "--- a/alpha/old.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-old = 1\n\\ No newline at end of file\n"
    )
    two = "--- a/beta/__init__.py\n+++ b/beta/__init__.py\n@@ -1 +1 @@\n-BETA = 1\n+BETA = 2\n"
    assert run("diff", "one") == one
    assert run("diff") == one + two


def test_build(run):
    assert "are new" in run("build")
    assert "are up to date" in run("build")
    assert "are new" in run("build", "--force")


def test_check(run, project):
    run("build")
    run("table", "--write")
    assert run("check").splitlines() == [
        "ok: 2 patches: series and headers are complete",
        "ok: every patch applies, and two builds give the same 6 files",
        "ok: the trees in external/ are what the patches make",
        "ok: the table in windows_patches.md shows these patches",
        "ok: alpha and beta can be imported",
    ]


def test_check_finds_a_tree_that_was_changed_by_hand(run, project):
    run("build")
    run("table", "--write")
    (project.root / "external" / "beta" / "beta" / "__init__.py").write_text("BETA = 3\n")
    with pytest.raises(
        UserError, match="The trees in .*external are out of date. Run: petals-win patches build --force"
    ):
        run("check")


def test_check_finds_an_old_table(run):
    run("build")
    with pytest.raises(UserError, match="The table in .*windows_patches.md is out of date. Run: .* table --write"):
        run("check")


def test_check_finds_what_cannot_be_imported(run, project):
    project.patch("alpha/three.py", 'add_import("alpha", "import no_such_module")\n')
    run("build")
    run("table", "--write")
    with pytest.raises(UserError, match="cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"):
        run("check")


def test_table(run, project):
    assert run("table").splitlines() == [
        "| patch | changes | why | status | drop when |",
        "|---|---|---|---|---|",
        "| `alpha/one.py` | Change something. | it fails on Windows | windows-only | never |",
        "| `beta/two.py` | Change something. | it fails on Windows | windows-only | never |",
    ]
    run("table", "--write")
    written = project.checkout.register.read_text(encoding="utf-8")
    assert written == f"# Title\n<!-- patches:begin -->\n{run('table')}<!-- patches:end -->\nEnd.\n"
    run("table", "--write")
    assert project.checkout.register.read_text(encoding="utf-8") == written


def test_table_without_a_place(run, project):
    project.checkout.register.write_text("# Title\n", encoding="utf-8")
    with pytest.raises(UserError, match="has no place for the table"):
        run("table", "--write")


def test_digest(run, project):
    stated = project.root.joinpath("patches/alpha/one.py").read_text(encoding="utf-8")
    for line in run("digest", "alpha:f", "alpha.old").splitlines():
        digest, symbol = line.split()
        assert f'"{symbol}", digest="{digest}"' in stated


def test_digest_fill(run, project):
    path = project.root / "patches" / "alpha" / "one.py"
    filled = path.read_bytes()
    assert run("digest", "--fill", str(path)) == ""
    path.write_bytes(filled.replace(filled.split(b'digest="')[1][:16], b"?"))
    assert path.read_bytes() != filled
    assert run("digest", "--fill", str(path)).split()[1] == "alpha:f"
    assert path.read_bytes() == filled


def test_digest_fill_outside_of_patches(run, tmp_path):
    with pytest.raises(UserError, match="is no patch"):
        run("digest", "--fill", str(tmp_path / "x.py"))


def test_digest_of_nothing(run):
    assert CliRunner().invoke(app, ["digest"]).exit_code == 2


def test_an_installed_package_has_no_patches(monkeypatch, tmp_path):
    monkeypatch.setattr(building, "__file__", str(tmp_path / "a" / "b" / "c" / "build.py"))
    with pytest.raises(UserError, match="in a checkout of petals-win; this is an installed package"):
        CliRunner().invoke(app, ["list"], catch_exceptions=False)


@pytest.mark.parametrize("command", [["check"], ["table", "--write"]])
def test_a_source_archive_lacks_the_register(run, project, command):
    run("digest", "--fill", str(project.checkout.patches / "alpha" / "one.py"))
    run("digest", "--fill", str(project.checkout.patches / "beta" / "two.py"))
    run("build")
    project.checkout.register.unlink()
    with pytest.raises(UserError, match="windows_patches.md is missing"):
        run(*command)
