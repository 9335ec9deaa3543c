"""One patch, read from its file: header and declarations. The file is parsed, never run.

Knows what a patch may say. Does not know upstream.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import libcst as cst

from petals_win.upstream import declare
from petals_win.upstream.errors import PatchError
from petals_win.upstream.header import Header, parse_header
from petals_win.upstream.syntax import Source

WHOLE_FILE = ("replace_module", "add_module")
_ONLY = "replace_module and add_module must be the only declaration of a patch"
_DECORATORS = ("replace", "add")
_CALLS = (
    "remove",
    "set_value",
    "bases",
    "swap_call",
    "add_import",
    "remove_import",
    "redirect_import",
    "remove_module",
    "remove_package",
    *WHOLE_FILE,
)


@dataclass(frozen=True)
class Code:
    """Source text at column 0 without a final newline; `verbatim` lines, counted from 0, lie inside of strings."""

    text: str
    name: str = ""
    verbatim: frozenset[int] = frozenset()

    def indented(self, indent: str) -> str:
        lines = self.text.split("\n")
        return "\n".join(
            indent + line if line and number not in self.verbatim else line for number, line in enumerate(lines)
        )


@dataclass(frozen=True)
class Declaration:
    """One change. module, symbol: the two sides of the target's colon; arguments: the others, by parameter name.

    patch: the name of its patch. digest_span: where the digest's literal lies in the patch, in bytes of its UTF-8
    text; None if the declaration takes none.
    """

    patch: str
    kind: str
    module: str
    symbol: str
    arguments: Mapping[str, Any]
    code: Code | None = None
    digest_span: tuple[int, int] | None = None

    @property
    def target(self) -> str:
        return f"{self.module}:{self.symbol}" if self.symbol else self.module

    def refusal(self, reason: str) -> PatchError:
        """The error to raise if this cannot be done."""
        return PatchError(self.patch, self.target, reason)


@dataclass(frozen=True)
class Patch:
    """name: as in patches/series, like "petals/one_handler.py". text: of the file, with \\n newlines."""

    name: str
    header: Header
    declarations: tuple[Declaration, ...]
    text: str


def read_series(patches: Path) -> tuple[Patch, ...]:
    """All patches of the folder in their order. Raises PatchError unless series and files agree."""
    series = patches / "series"
    try:
        lines = series.read_text(encoding="utf-8").splitlines()
    except OSError as e:
        raise PatchError("series", "", f"{series} cannot be read ({e.strerror})") from e
    names = [name for line in lines if (name := line.partition("#")[0].strip())]
    files = {path.relative_to(patches).as_posix() for path in patches.rglob("*.py")}
    for name in names:
        if names.count(name) > 1:
            raise PatchError("series", name, "it is listed twice. Delete one of the lines.")
        if name not in files:
            raise PatchError("series", name, f"there is no such file below {patches}")
    if unlisted := sorted(files.difference(names)):
        raise PatchError(unlisted[0], "", "it is not listed in series. Add a line for it there, or delete the file.")
    return tuple(read_patch(name, (patches / name).read_bytes()) for name in names)


def read_patch(name: str, content: bytes) -> Patch:
    """Raises PatchError if it says anything that a patch may not."""
    return _Reader(name, content.replace(b"\r\n", b"\n")).read()


class _Reader:
    def __init__(self, name: str, content: bytes):
        self.name = name
        try:
            self.source = Source(content)
        except ValueError as e:
            raise PatchError(name, "", str(e)) from e

    def read(self) -> Patch:
        statements = [(start, end, node) for start, end, node in self.source.body]
        docstring = _expression(statements[0][2]) if statements else None
        if not isinstance(docstring, (cst.SimpleString, cst.ConcatenatedString)):
            raise PatchError(self.name, "", "it does not begin with a docstring header")
        try:
            header = parse_header(str(docstring.evaluated_value))
        except ValueError as e:
            raise PatchError(self.name, "", str(e)) from e
        self.known = self._imported(statements[1][2]) if len(statements) > 1 else ()
        if not self.known:
            raise PatchError(self.name, "", f"after the header must come: from {declare.__name__} import ...")
        if len(statements) < 3:
            raise PatchError(self.name, "", "it declares nothing")
        whole = self._call(statements[2][2])
        if whole is not None and whole.kind in WHOLE_FILE:
            declarations: tuple[Declaration, ...] = (self._module(whole, header, statements),)
        else:
            declarations = tuple(self._declaration(start, end, node) for start, end, node in statements[2:])
        return Patch(self.name, header, declarations, self.source.data.decode())

    def _imported(self, statement: cst.CSTNode) -> tuple[str, ...]:
        """The names that the statement imports from the declarations; none if it is another statement."""
        if not isinstance(statement, cst.SimpleStatementLine):
            return ()
        node = statement.body[0]
        if not isinstance(node, cst.ImportFrom) or isinstance(node.names, cst.ImportStar) or node.module is None:
            return ()
        if cst.Module([]).code_for_node(node.module) != declare.__name__:
            return ()
        return tuple(alias.evaluated_name for alias in node.names if alias.asname is None)

    def _module(self, declaration: Declaration, header: Header, statements: list) -> Declaration:
        for _start, _end, node in statements[3:]:
            if self._call(node) is not None:
                raise declaration.refusal(_ONLY)
        text = self.source.data[statements[2][1] :].decode().strip("\n")
        docstring = f'"""Made by patches/{self.name}: {header.subject}"""'
        code = Code(f"{docstring}\n\n{text}" if text else docstring)
        return replace(declaration, code=code)

    def _declaration(self, start: int, end: int, node: cst.CSTNode) -> Declaration:
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            return self._definition(start, end, node)
        declaration = self._call(node)
        if declaration is None:
            raise self._unknown(start)
        if declaration.kind in WHOLE_FILE:
            raise declaration.refusal(_ONLY)
        return declaration

    def _call(self, node: cst.CSTNode) -> Declaration | None:
        call = _expression(node)
        if isinstance(call, cst.Call) and isinstance(call.func, cst.Name) and call.func.value in _CALLS:
            return self._bound(call)
        return None

    def _definition(self, start: int, end: int, node: cst.FunctionDef | cst.ClassDef) -> Declaration:
        ours = [
            decorator
            for decorator in node.decorators
            if isinstance(decorator.decorator, cst.Call)
            and isinstance(decorator.decorator.func, cst.Name)
            and decorator.decorator.func.value in _DECORATORS
        ]
        if not ours:
            raise self._unknown(start)
        if len(ours) > 1:
            raise PatchError(self.name, node.name.value, "it carries two declarations")
        call = ours[0].decorator
        assert isinstance(call, cst.Call)
        cut_start, cut_end = self.source.spans[ours[0]]
        cut = (self.source.line_of(cut_start), self.source.line_of(self.source.line_end(cut_end) - 1))
        first = self.source.line_of(start)
        lines = self.source.text(start, end).rstrip("\n").split("\n")
        kept = [number for number in range(first, first + len(lines)) if not cut[0] <= number <= cut[1]]
        verbatim = frozenset(at for at, number in enumerate(kept) if number in self.source.verbatim_lines)
        text = "\n".join(lines[number - first] for number in kept)
        return self._bound(call, Code(text, node.name.value, verbatim))

    def _bound(self, call: cst.Call, code: Code | None = None) -> Declaration:
        assert isinstance(call.func, cst.Name)
        kind = call.func.value
        if kind not in self.known:
            raise PatchError(self.name, kind, f"it is not imported from {declare.__name__}")
        positional: list[Any] = []
        named: dict[str, Any] = {}
        digest_span = None
        for argument in call.args:
            value = _literal(argument.value)
            if value is None or argument.star:
                raise PatchError(self.name, kind, "its arguments must be plain strings and numbers")
            if argument.keyword is None:
                positional.append(value)
                continue
            named[argument.keyword.value] = value
            if argument.keyword.value == "digest":
                digest_span = self.source.spans[argument.value]
        try:
            bound = inspect.signature(getattr(declare, kind)).bind(*positional, **named)
        except TypeError as e:
            raise PatchError(self.name, kind, f"its arguments are wrong ({e})") from e
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        module, _colon, symbol = str(arguments.pop("target")).partition(":")
        return Declaration(self.name, kind, module, symbol, arguments, code, digest_span)

    def _unknown(self, start: int) -> PatchError:
        return PatchError(
            self.name, f"line {self.source.line_of(start) + 1}", "this is no declaration that a patch may make"
        )


def _expression(statement: cst.CSTNode) -> cst.BaseExpression | None:
    if isinstance(statement, cst.SimpleStatementLine) and len(statement.body) == 1:
        expression = statement.body[0]
        if isinstance(expression, cst.Expr):
            return expression.value
    return None


def _literal(node: cst.BaseExpression) -> str | int | None:
    if isinstance(node, (cst.SimpleString, cst.ConcatenatedString)) and isinstance(node.evaluated_value, str):
        return node.evaluated_value
    return node.evaluated_value if isinstance(node, cst.Integer) else None
