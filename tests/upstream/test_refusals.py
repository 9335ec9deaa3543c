"""Every reason for which a patch is refused, and that the sentence names patch, symbol and reason."""

import re

import pytest

from petals_win.errors import UserError
from petals_win.upstream.errors import PatchError
from petals_win.upstream.header import parse_header

from .project import DECLARE, HEADER

UPSTREAM = """
    import os

    LIMIT = 1; OTHER = 2
    bare: int

    class C(Base):
        def m(self):
            return os.path.join("a")

        def n(self): pass

    class Short: x = 1

    def f():
        return g(1)
"""


@pytest.fixture
def refused(project):
    """Apply the patches and check the error's text; the first is alpha/one.py, the second alpha/two.py."""
    project.upstream("alpha/core.py", UPSTREAM)

    def refused(*bodies: str, saying: str, header: str = HEADER, fill: bool = True) -> None:
        with pytest.raises(PatchError, match=re.escape(saying)):
            for name, body in zip(("alpha/one.py", "alpha/two.py"), bodies, strict=False):
                project.patch(name, body, header=header, fill=fill)
            project.patched()

    return refused


REPLACE_M = '@replace("alpha.core:C.m", digest="?")\ndef m(self): pass\n'


@pytest.mark.parametrize("symbol", ["missing", "C.missing", "f#2", "missing.m"])
def test_missing_symbol(refused, symbol):
    refused(
        f'remove("alpha.core:{symbol}", digest="?")',
        saying=f"alpha/one.py: alpha.core:{symbol}: upstream's module has no symbol {symbol}",
    )


def test_missing_module(refused):
    refused('remove_module("alpha.lost", digest="?")', saying="alpha/one.py: alpha.lost: upstream has no such module")


def test_missing_package(refused):
    refused('remove_package("alpha.core", digest="?")', saying="alpha.core: upstream has no such package")


@pytest.mark.parametrize(
    ("body", "change"),
    [
        (REPLACE_M, ('join("a")', 'join("b")')),
        ('remove("alpha.core:C.m", digest="?")', ("def m(self)", "@cached\n    def m(self)")),
        ('set_value("alpha.core:LIMIT", "2", digest="?")', ("LIMIT = 1", "LIMIT = 3")),
        ('bases("alpha.core:C", "B", digest="?")', ("C(Base)", "C(Other)")),
        ('swap_call("alpha.core:f", "g", "h", digest="?")', ("g(1)", "g(2)")),
        ('replace_module("alpha.core", digest="?")\nx = 1', ("LIMIT = 1", "LIMIT = 3")),
        ('remove_module("alpha.core", digest="?")', ("LIMIT = 1", "LIMIT = 3")),
        ('remove_package("alpha.sub", digest="?")', ("", "")),
    ],
)
def test_stale_digest(project, body, change):
    project.upstream("alpha/core.py", UPSTREAM)
    project.upstream("alpha/sub/__init__.py", "x = 1\n")
    project.patch("alpha/one.py", body)
    project.patched()
    moved = project.files["alpha/core.py"].decode().replace(*change)
    assert moved != project.files["alpha/core.py"].decode() or change == ("", "")
    project.upstream("alpha/core.py", moved)
    project.upstream("alpha/sub/__init__.py", "x = 2\n")
    with pytest.raises(
        PatchError, match=r"alpha/one.py: alpha\..*: the patch is stale: upstream's source has the digest"
    ):
        project.patched()


def test_a_digest_survives_what_does_not_matter(project):
    project.upstream("alpha/core.py", UPSTREAM)
    project.patch("alpha/one.py", REPLACE_M)
    moved = (
        project.files["alpha/core.py"].decode().replace("import os", "import os, re").replace("    def n", "    def k")
    )
    project.files["alpha/core.py"] = (
        moved.replace("    def m(self):", "    def m(self):   ").replace("\n", "\r\n").encode()
    )
    assert "def m(self): pass\r\n" in project.patched()["alpha/core.py"]


def test_digest_not_filled_in(refused):
    refused(
        REPLACE_M,
        fill=False,
        saying="its digest is not filled in. Run: petals-win patches digest --fill patches/alpha",
    )


@pytest.mark.parametrize(
    "other",
    [
        REPLACE_M,
        '@replace("alpha.core:C", digest="?")\nclass C: pass\n',
        'remove("alpha.core:C.m", digest="?")',
        'remove("alpha.core:C", digest="?")',
        'swap_call("alpha.core:C.m", "os.path.join", "join", digest="?")',
        'replace_module("alpha.core", digest="?")\nx = 1',
        'remove_module("alpha.core", digest="?")',
        'remove_package("alpha", digest="?")',
    ],
)
@pytest.mark.parametrize("reverse", [False, True])
def test_two_patches_claim_one_symbol(refused, other, reverse):
    bodies = (other, REPLACE_M) if reverse else (REPLACE_M, other)
    refused(*bodies, saying="alpha/one.py changes it too")


@pytest.mark.parametrize(
    "body",
    [
        'add_import("alpha.core", "import x")',
        'remove_import("alpha.core", "os")',
        'bases("alpha.core:C", "B", digest="?")',
        '@add("alpha.core:C")\ndef new(self): pass\n',
    ],
)
def test_a_changed_module_cannot_be_removed(refused, body):
    refused(
        body, 'remove_module("alpha.core", digest="?")', saying="alpha/two.py: alpha.core: alpha/one.py changes it too"
    )


@pytest.mark.parametrize(
    "body",
    [
        'bases("alpha.core:C", "B", digest="?")',
        '@add("alpha.core:C")\ndef new(self): pass\n',
        'remove_import("alpha.core", "os")',
        'swap_call("alpha.core:f", "g", "h", digest="?")',
        'set_value("alpha.core:LIMIT", "2", digest="?")',
    ],
)
def test_two_patches_make_the_same_change(refused, body):
    refused(body, body, saying="alpha/one.py changes it too")


def test_one_patch_changes_a_symbol_twice(refused):
    refused(REPLACE_M + 'remove("alpha.core:C.m", digest="?")', saying="this patch changes it twice")


def test_two_patches_change_the_same_text(refused):
    refused(
        'swap_call("alpha.core:", "os.path.join", "join", digest="?")',
        REPLACE_M,
        saying="changes the same lines",
    )


def test_not_in_series(project):
    project.patch("alpha/one.py", 'add_import("alpha", "import os")', listed=False, fill=False)
    with pytest.raises(PatchError, match="^alpha/one.py: it is not listed in series"):
        project.patched()


def test_listed_twice(project):
    project.series.append("alpha/one.py")
    project.patch("alpha/one.py", 'add_import("alpha", "import os")', fill=False)
    with pytest.raises(PatchError, match="^series: alpha/one.py: it is listed twice"):
        project.patched()


def test_listed_but_missing(project):
    project.series.append("alpha/gone.py")
    project.write_series()
    with pytest.raises(PatchError, match="^series: alpha/gone.py: there is no such file"):
        project.patched()


def test_no_series(project):
    with pytest.raises(PatchError, match="^series: .* cannot be read"):
        project.patched()


@pytest.mark.parametrize("field", ["Why", "Status", "Upstream-issue", "Drop-when"])
def test_header_field_missing(refused, field):
    header = "".join(line for line in HEADER.splitlines(keepends=True) if not line.startswith(field))
    refused(
        'add_import("alpha", "import os")', header=header, saying=f"alpha/one.py: the header lacks the field {field}:"
    )


@pytest.mark.parametrize(
    ("old", "new", "saying"),
    [
        ("Why: it fails on Windows", "Why:", "the header lacks the field Why:"),
        ("windows-only", "done", "the status 'done' is none of pending, submitted LINK"),
        ("windows-only", "submitted", "the status 'submitted' is none of"),
        ("Status:", "State:", "the header line 'State: windows-only' is none of Why:, Status:"),
        ("Upstream-issue: none", "Status: pending", "the header has the field Status: twice"),
        ("\n\nWhy", "\nWhy", "the docstring must begin with a subject line and a blank line"),
        ('"""Change something.', 'X = """', "it does not begin with a docstring header"),
    ],
)
def test_header_wrong(refused, old, new, saying):
    refused('add_import("alpha", "import os")', header=HEADER.replace(old, new), saying=f"alpha/one.py: {saying}")


@pytest.mark.parametrize(
    "status",
    ["pending", "submitted https://x/1", "backport https://x/2", "windows-only", "superseded-by petals_win.span"],
)
def test_header_on_several_lines(status):
    header = parse_header(
        f"S.\n\n    Why: one\n        two\n    Status: {status}\n    Upstream-issue: #1\n    Drop-when: a: b\n"
    )
    assert (header.subject, header.why, header.status, header.drop_when) == ("S.", "one two", status, "a: b")


@pytest.mark.parametrize(
    ("body", "saying"),
    [
        ("x = 1", "line 14: this is no declaration that a patch may make"),
        ("import os", "line 14: this is no declaration that a patch may make"),
        ("def f():\n    pass", "line 14: this is no declaration that a patch may make"),
        ("@cached\ndef f():\n    pass", "line 14: this is no declaration that a patch may make"),
        ('rename("alpha.core:f", "g")', "line 14: this is no declaration that a patch may make"),
        ("remove(name, digest='?')", "remove: its arguments must be plain strings and numbers"),
        ("remove('alpha.core' + ':f', digest='?')", "remove: its arguments must be plain strings and numbers"),
        ("bases('alpha.core:C', *names, digest='?')", "bases: its arguments must be plain strings and numbers"),
        ("remove('alpha.core:f')", "remove: its arguments are wrong (missing a required argument: 'digest')"),
        ("add_import('alpha.core')", "add_import: its arguments are wrong"),
        ("@add('alpha.core')\n@add('alpha.core')\ndef new(): pass", "new: it carries two declarations"),
        (
            "replace_module('alpha.core', digest='?')\nadd_import('alpha', 'import os')",
            "replace_module and add_module must be the only declaration",
        ),
        (
            "add_import('alpha', 'import os')\nreplace_module('alpha.core', digest='?')",
            "replace_module and add_module must be the only declaration",
        ),
        ("", "alpha/one.py: it declares nothing"),
        ("def (", "alpha/one.py: it cannot be parsed"),
    ],
)
def test_declaration_wrong(refused, body, saying):
    assert len(HEADER.splitlines()) + len(DECLARE.splitlines()) + 2 == 13
    refused(body, saying=saying, fill=False)


def test_declarations_must_be_imported(project):
    body = 'from petals_win.upstream.declare import add\n\nadd_import("alpha", "import os")\n'
    path = project.patch("alpha/one.py", "", fill=False)
    path.write_text(f"{HEADER}\n{body}", encoding="utf-8")
    with pytest.raises(PatchError, match="alpha/one.py: add_import: it is not imported"):
        project.patched()
    path.write_text(f"{HEADER}\nimport os\n", encoding="utf-8")
    with pytest.raises(PatchError, match="alpha/one.py: after the header must come: from petals_win.upstream.declare"):
        project.patched()


@pytest.mark.parametrize(
    ("body", "saying"),
    [
        ('@add("alpha.core:C")\ndef m(self): pass\n', "alpha.core:C: upstream has C.m already: use replace"),
        ('@add("alpha.core")\ndef os(): pass\n', "alpha.core: upstream has os already: use replace"),
        ('@add("alpha.core:f")\ndef x(): pass\n', "alpha.core:f: it is no class with lines of its own"),
        ('@add("alpha.core:Short")\ndef x(): pass\n', "alpha.core:Short: it is no class with lines of its own"),
        ('@add("alpha.core", after="h")\ndef x(): pass\n', "alpha.core: upstream's module has no symbol h"),
        ('@replace("alpha.core:C.m", digest="?")\ndef n(self): pass\n', "upstream has C.n already"),
        ('@replace("alpha.core:LIMIT", digest="?")\ndef LIMIT(): pass\n', "it is an assignment: use set_value"),
        ('remove("alpha.core:LIMIT", digest="?")', "it shares its line with other statements"),
        ('set_value("alpha.core:f", "1", digest="?")', "it is no assignment of a value"),
        ('set_value("alpha.core:bare", "1", digest="?")', "it is no assignment of a value"),
        ('bases("alpha.core:f", "B", digest="?")', "it is no class"),
        ('swap_call("alpha.core:f", "g", "h", digest="?", nth=2)', "it has 1 calls of g, so call 2 was not found"),
        ('swap_call("alpha.core:C", "g", "h", digest="?")', "it has 0 calls of g"),
        ('add_import("alpha.core", "x = 1")', "'x = 1' is no import statement"),
        ('add_import("alpha.core", "import")', "'import' is no import statement"),
        ('remove_import("alpha.core", "path")', "upstream's module does not import path at its top level"),
        ('redirect_import("alpha.core", "path", "import path")', "upstream's module does not import path"),
        ('add_module("alpha.core")\nx = 1', "upstream has it already: use replace_module"),
        ('add_module("alpha.no.such")\nx = 1', "upstream has no package that it could be in"),
        ('add_import("beta", "import os")', "a patch in patches/alpha changes alpha only"),
        ('set_value("alpha.core:OTHER", "1 +", digest="?")', "the result is not valid Python"),
    ],
)
def test_change_impossible(refused, body, saying):
    refused(body, saying=saying)


def test_upstream_that_is_no_python(project):
    project.files["alpha/core.py"] = b"print 1\n"
    project.patch("alpha/one.py", 'add_import("alpha.core", "import os")', fill=False)
    with pytest.raises(PatchError, match="alpha/one.py: alpha.core: it cannot be parsed"):
        project.patched()


def test_all_of_them_are_errors_for_the_user():
    assert issubclass(PatchError, UserError)
