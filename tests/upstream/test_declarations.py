"""What each declaration makes of upstream's source, to the byte."""

import textwrap

import pytest

from petals_win.upstream.fill import fill_digests

UPSTREAM = '''
"""A module."""

from __future__ import annotations

import os
import sys, json
from pathlib import (
    Path,
    PurePath,  # both
    PosixPath,
)

try:
    import fast
except ImportError:
    fast = None

LIMIT = 10  # per node
NAMES: list = ["a"]


# What an engine does.
class Engine(Base, metaclass=Meta):
    size = 1

    @property
    def speed(self):
        return self._speed

    @speed.setter
    def speed(self, value):
        self._speed = value
        # in m/s

    async def run(self):
        first = start(os.path.join("a"), start(1))
        return first


class Plain:
    def only(self):
        pass


def start(x, y=None):
    def inner():
        return connect(x)

    return inner()
'''


@pytest.fixture
def apply(project):
    """Patch the module above by one patch and return it."""

    def apply(body: str) -> str:
        project.upstream("alpha/core.py", UPSTREAM)
        project.patch("alpha/one.py", body)
        return project.patched()["alpha/core.py"]

    return apply


def expected(*changes: tuple[str, str]) -> str:
    text = UPSTREAM.lstrip("\n")
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_replace_a_method_keeps_other_decorators_and_indents(apply):
    body = '''
        @replace("alpha.core:Engine.run", digest="?")
        @traced
        async def run(self):
            """Run.

            Again.
            """
            text = f"""
        {self} stays
            """

            return text
    '''
    new = '''    @traced
    async def run(self):
        """Run.

        Again.
        """
        text = f"""
{self} stays
    """

        return text
'''
    old = '    async def run(self):\n        first = start(os.path.join("a"), start(1))\n        return first\n'
    assert apply(body) == expected((old, new))


def test_replace_takes_upstreams_decorators_and_trailing_comment_away(apply):
    body = """
        @replace("alpha.core:Engine.speed#2", digest="?")
        def speed(self): ...
    """
    old = "    @speed.setter\n    def speed(self, value):\n        self._speed = value\n        # in m/s\n"
    assert apply(body) == expected((old, "    def speed(self): ...\n"))


def test_replace_the_first_of_two_definitions(apply):
    body = """
        @replace("alpha.core:Engine.speed", digest="?")
        @property
        def speed(self):
            return 0
    """
    assert apply(body) == expected(("return self._speed\n", "return 0\n"))


def test_replace_a_class_and_an_inner_function(apply):
    body = """
        @replace("alpha.core:Plain", digest="?")
        class Plain(Engine):
            pass

        @replace("alpha.core:start.inner", digest="?")
        def inner():
            return 2
    """
    plain = "class Plain:\n    def only(self):\n        pass\n"
    assert apply(body) == expected((plain, "class Plain(Engine):\n    pass\n"), ("return connect(x)", "return 2"))


def test_replace_by_another_name(apply):
    body = """
        @replace("alpha.core:Plain.only", digest="?")
        def other(self):
            pass
    """
    assert apply(body) == expected(("def only", "def other"))


def test_add_to_module_and_class(apply):
    body = """
        @add("alpha.core:Plain")
        @staticmethod
        def more():
            return 1

        @add("alpha.core")
        async def last():
            pass

        @add("alpha.core", after="Engine")
        class Second:
            pass

        @add("alpha.core:Engine", after="speed#2")
        def stop(self):
            pass
    """
    assert apply(body) == expected(
        ("        # in m/s\n", "        # in m/s\n\n    def stop(self):\n        pass\n"),
        ("        return first\n", "        return first\n\n\nclass Second:\n    pass\n"),
        (
            "    def only(self):\n        pass\n",
            "    def only(self):\n        pass\n\n    @staticmethod\n    def more():\n        return 1\n",
        ),
        ("    return inner()\n", "    return inner()\n\n\nasync def last():\n    pass\n"),
    )


def test_add_to_the_last_class_and_to_a_module_without_final_newline(project):
    project.files["alpha/core.py"] = b"class C:\n\tx = 1"
    body = """
        @add("alpha.core")
        def f(): ...

        @add("alpha.core:C")
        def m(self):
            return 1
    """
    project.patch("alpha/one.py", body)
    new = "class C:\n\tx = 1\n\n\tdef m(self):\n\t    return 1\n"
    assert project.patched()["alpha/core.py"].startswith(new)


def test_remove_functions_classes_and_assignments(apply):
    body = """
        remove("alpha.core:Engine.run", digest="?")
        remove("alpha.core:Engine.size", digest="?")
        remove("alpha.core:Plain.only", digest="?")
        remove("alpha.core:start", digest="?")
        remove("alpha.core:LIMIT", digest="?")
    """
    run = '\n    async def run(self):\n        first = start(os.path.join("a"), start(1))\n        return first\n'
    start = "\n\ndef start(x, y=None):\n    def inner():\n        return connect(x)\n\n    return inner()\n"
    assert apply(body) == expected(
        (run, ""),
        ("    size = 1\n", ""),
        ("    def only(self):\n        pass\n", "    pass\n"),
        (start, ""),
        ("LIMIT = 10  # per node\n", ""),
    )


def test_set_value(apply):
    body = """
        set_value("alpha.core:LIMIT", "max(1, 2)", digest="?")
        set_value("alpha.core:NAMES", "[]", digest="?")
        set_value("alpha.core:Engine.size", "2", digest="?")
    """
    assert apply(body) == expected(("LIMIT = 10 ", "LIMIT = max(1, 2) "), ('["a"]', "[]"), ("size = 1", "size = 2"))


def test_bases(apply):
    body = """
        bases("alpha.core:Engine", "Other", "metaclass=ABCMeta", digest="?")
        bases("alpha.core:Plain", "Engine", digest="?")
    """
    assert apply(body) == expected(
        ("Engine(Base, metaclass=Meta)", "Engine(Other, metaclass=ABCMeta)"), ("class Plain:", "class Plain(Engine):")
    )


def test_bases_taken_away(apply):
    assert apply('bases("alpha.core:Engine", digest="?")') == expected(("Engine(Base, metaclass=Meta)", "Engine"))


def test_swap_calls_are_counted_in_upstreams_text(apply):
    body = """
        swap_call("alpha.core:Engine.run", "start", "begin", digest="?", nth=1)
        swap_call("alpha.core:Engine.run", "start", "self.begin", digest="?", nth=2)
        swap_call("alpha.core:Engine.run", "os.path.join", "join", digest="?")
        swap_call("alpha.core:", "connect", "dial", digest="?")
    """
    old = 'start(os.path.join("a"), start(1))'
    assert apply(body) == expected((old, 'begin(join("a"), self.begin(1))'), ("connect(x)", "dial(x)"))


def test_add_import(apply):
    body = """
        add_import("alpha.core", "from a import b as c")
        add_import("alpha.core", "import z")
        add_import("alpha.core", "import z")
    """
    assert apply(body) == expected(("    PosixPath,\n)\n", "    PosixPath,\n)\nfrom a import b as c\nimport z\n"))


@pytest.mark.parametrize(
    ("text", "result"),
    [
        (b"", "import z\n"),
        (b'"""Doc."""', '"""Doc."""\n\nimport z\n'),
        (b'"""Doc."""\nx = 1\n', '"""Doc."""\n\nimport z\nx = 1\n'),
        (b"# comment\nx = 1\n", "# comment\nimport z\n\nx = 1\n"),
        (b"import a; import b", "import a; import b\nimport z\n"),
    ],
)
def test_add_import_to_a_module_without_imports(project, text, result):
    project.files["alpha/core.py"] = text
    project.patch("alpha/one.py", 'add_import("alpha.core", "import z")')
    assert project.patched()["alpha/core.py"] == result


def test_remove_import(apply):
    body = """
        remove_import("alpha.core", "os")
        remove_import("alpha.core", "json")
        remove_import("alpha.core", "Path")
        remove_import("alpha.core", "PosixPath")
        remove_import("alpha.core", "fast")
    """
    assert apply(body) == expected(
        ("import os\n", ""),
        ("import sys, json", "import sys"),
        ("    Path,\n    PurePath,  # both\n    PosixPath,\n", "    PurePath,\n"),
        ("    import fast\n", "    pass\n"),
    )


def test_remove_all_imports_of_a_statement(apply):
    body = """
        remove_import("alpha.core", "sys")
        remove_import("alpha.core", "json")
        remove_import("alpha.core", "annotations")
    """
    assert apply(body) == expected(("from __future__ import annotations\n\n", ""), ("import sys, json\n", ""))


def test_redirect_import(apply):
    assert apply('redirect_import("alpha.core", "os", "import mine as os")') == expected(
        ("import os\n", ""), ("    PosixPath,\n)\n", "    PosixPath,\n)\nimport mine as os\n")
    )


def test_replace_module(project):
    project.patch("alpha/one.py", 'replace_module("alpha", digest="?")\n\nfrom os import sep\n\nx = sep  # why\n')
    expected = '"""Made by patches/alpha/one.py: Change something."""\n\nfrom os import sep\n\nx = sep  # why\n'
    assert project.patched()["alpha/__init__.py"] == expected


def test_add_module(project):
    project.patch("alpha/one.py", 'add_module("alpha.new")\n\n\ndef f():\n    pass\n')
    expected = '"""Made by patches/alpha/one.py: Change something."""\n\ndef f():\n    pass\n'
    assert project.patched()["alpha/new.py"] == expected


def test_remove_module_and_package(project):
    for path in ("alpha/core.py", "alpha/sub/__init__.py", "alpha/sub/deep/x.py", "alpha/subway.py"):
        project.upstream(path, "x = 1\n")
    body = 'remove_module("alpha.core", digest="?")\nremove_package("alpha.sub", digest="?")\n'
    project.patch("alpha/one.py", body)
    assert set(project.patched()) == {"alpha/__init__.py", "alpha/subway.py", "beta/__init__.py"}


def test_several_patches_change_one_module(project):
    project.upstream("alpha/core.py", UPSTREAM)
    project.patch("alpha/one.py", 'bases("alpha.core:Plain", "A", digest="?")\nadd_import("alpha.core", "import z")\n')
    two = """
        add_import("alpha.core", "import z")
        @replace("alpha.core:Plain.only", digest="?")
        def only(self):
            return z
    """
    project.patch("alpha/two.py", two)
    assert project.patched()["alpha/core.py"] == expected(
        ("class Plain:", "class Plain(A):"),
        ("    def only(self):\n        pass\n", "    def only(self):\n        return z\n"),
        ("    PosixPath,\n)\n", "    PosixPath,\n)\nimport z\n"),
    )


def test_untouched_text_stays_byte_for_byte(project):
    """CRLF, tabs, odd spacing, a form feed, an encoding line, a byte order mark and white space at line ends."""
    latin = "# -*- coding: latin-1 -*-\r\nname  =  'Zo\xeb' ;other=( 1,\r\n\t2 )   \r\n\x0c\r\ndef f( x ):\r\n\treturn x   \r\n\t\r\n"
    bom = b"\xef\xbb\xbfx = '\xc3\xab'\n\n\ndef f():\n   pass\n"
    project.files["alpha/latin.py"] = (latin + "def g (): return   'a'  # end").encode("latin-1")
    project.files["alpha/bom.py"] = bom
    body = textwrap.dedent('''
        @replace("alpha.latin:g", digest="?")
        def g():
            return """é
        """

        @replace("alpha.bom:f", digest="?")
        def f():
            return 1
        ''')
    project.patch("alpha/one.py", body)
    project.pack()
    patched = project.checkout.patched_files()
    assert patched["alpha/latin.py"] == (latin + 'def g():\r\n    return """\xe9\r\n"""\r\n').encode("latin-1")
    assert patched["alpha/bom.py"] == bom.replace(b"   pass", b"    return 1")


def test_a_patch_with_crlf_gives_the_same_result(project):
    project.upstream("alpha/core.py", "def f():\n    pass\n")
    path = project.patch(
        "alpha/one.py", '@replace("alpha.core:f", digest="?")\ndef f():\n    return """\n"""\n', fill=False
    )
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    project.pack()
    [(target, _)] = fill_digests(path, project.checkout.patches, project.checkout.upstream_files())
    assert target == "alpha.core:f"
    assert path.read_bytes().count(b"\r\n") == path.read_bytes().count(b"\n")
    assert project.patched()["alpha/core.py"] == 'def f():\n    return """\n"""\n'
