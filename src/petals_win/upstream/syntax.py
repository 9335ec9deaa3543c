"""Python source as a concrete syntax tree with the place of everything that a patch can name.

Knows LibCST, offsets and line ends. Does not know patches.
"""

from __future__ import annotations

import bisect
import io
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import libcst as cst
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper


@dataclass(frozen=True)
class Symbol:
    """A function, class, or assignment to one name.

    start, end: its whole lines, decorators and indented trailing comments included, as offsets.
    """

    path: str
    node: cst.FunctionDef | cst.ClassDef | cst.Assign | cst.AnnAssign
    start: int
    end: int
    block: cst.CSTNode
    alone_on_line: bool


@dataclass(frozen=True)
class ImportStatement:
    """An import outside of functions and classes. names: as bound, or in full for `import a.b`; spans: one for each."""

    names: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    start: int
    end: int
    block: cst.CSTNode
    line: tuple[int, int]
    alone_on_line: bool


@dataclass(frozen=True)
class Call:
    """A call: the text of what is called, and where that text is."""

    callee: str
    start: int
    end: int


def decode(content: bytes) -> tuple[str, str]:
    """A Python file's text, newlines untouched, and its encoding. Raises ValueError."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding), encoding
    except (SyntaxError, UnicodeDecodeError) as e:
        raise ValueError(f"it cannot be decoded ({e})") from e


class Source:
    """A parsed file. Offsets count the bytes of `data`, which is the file's text in UTF-8 without a byte order mark."""

    def __init__(self, content: bytes):
        """Raises ValueError if this is not Python that can be reproduced byte for byte."""
        text, self.encoding = decode(content)
        try:
            module = cst.parse_module(text)
        except cst.ParserSyntaxError as e:
            raise ValueError(f"it cannot be parsed ({e})") from e
        if module.code != text:
            raise ValueError("the parser does not reproduce it")
        self.newline, self.data = module.default_newline, text.encode()
        self._line_starts = [0, *(at + 1 for at, byte in enumerate(self.data) if byte == 0x0A)]
        index = _Index(self)
        MetadataWrapper(module, unsafe_skip_copy=True).visit(index)
        self.symbols: dict[str, Symbol] = index.symbols
        self.imports: list[ImportStatement] = index.imports
        self.calls: list[Call] = sorted(index.calls, key=lambda call: (call.start, call.end))
        self.body: list[tuple[int, int, cst.CSTNode]] = index.body
        self.spans: dict[cst.CSTNode, tuple[int, int]] = index.spans
        self.verbatim_lines: set[int] = index.verbatim_lines
        self.block_sizes: dict[cst.CSTNode, int] = index.block_sizes

    def text(self, start: int, end: int) -> str:
        return self.data[start:end].decode()

    def line_of(self, offset: int) -> int:
        """The number of the line, from 0."""
        return bisect.bisect_right(self._line_starts, offset) - 1

    def line_start(self, offset: int) -> int:
        return self._line_starts[self.line_of(offset)]

    def line_end(self, offset: int) -> int:
        """The offset after the newline of this line."""
        found = self.data.find(b"\n", offset)
        return len(self.data) if found < 0 else found + 1

    def blank_before(self, line_start: int) -> int:
        """Where the blank lines before this line begin."""
        while line_start and not self.data[(previous := self.line_start(line_start - 1)) : line_start].strip():
            line_start = previous
        return line_start

    def is_blank_or_end(self, line_start: int) -> bool:
        return not self.data[line_start : self.line_end(line_start)].strip()

    def indent(self, line_start: int) -> str:
        line = self.text(line_start, self.line_end(line_start))
        return line[: len(line) - len(line.lstrip())]

    def end_with_comments(self, end: int, indent: str) -> int:
        """Extend the end of a definition over comment lines that are indented deeper than the definition."""
        at = end
        while at < len(self.data):
            line = self.text(at, self.line_end(at))
            if line.strip():
                own = line[: len(line) - len(line.lstrip())]
                if not line.lstrip().startswith("#") or len(own) <= len(indent):
                    break
                end = self.line_end(at)
            at = self.line_end(at)
        return end


class _Index(cst.CSTVisitor):
    """One walk that records what `Source` offers."""

    METADATA_DEPENDENCIES = (ByteSpanPositionProvider,)

    def __init__(self, source: Source):
        super().__init__()
        self.source = source
        self.symbols: dict[str, Symbol] = {}
        self.imports: list[ImportStatement] = []
        self.calls: list[Call] = []
        self.body: list[tuple[int, int, cst.CSTNode]] = []
        self.spans: dict[cst.CSTNode, tuple[int, int]] = {}
        self.verbatim_lines: set[int] = set()
        self.block_sizes: dict[cst.CSTNode, int] = {}
        self._scope: list[tuple[str, cst.CSTNode]] = []
        self._blocks: list[cst.CSTNode] = []
        self._docstrings: set[cst.CSTNode] = set()
        self._lines: list[cst.SimpleStatementLine] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        self.spans[node] = self._span(node)
        if isinstance(node, (cst.Module, cst.IndentedBlock, cst.SimpleStatementSuite)):
            self._blocks.append(node)
            self.block_sizes[node] = len(node.body)
        return super().on_visit(node)

    def on_leave(self, original_node: cst.CSTNode) -> None:
        super().on_leave(original_node)
        if isinstance(original_node, (cst.Module, cst.IndentedBlock, cst.SimpleStatementSuite)):
            self._blocks.pop()
        elif len(self._blocks) == 1 and isinstance(
            original_node, (cst.BaseCompoundStatement, cst.SimpleStatementLine)
        ):
            self.body.append((*self._line_span(original_node), original_node))

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self._enter(node)

    def leave_FunctionDef(self, original_node: cst.FunctionDef) -> None:
        self._scope.pop()

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self._enter(node)

    def leave_ClassDef(self, original_node: cst.ClassDef) -> None:
        self._scope.pop()

    def visit_SimpleStatementLine(self, node: cst.SimpleStatementLine) -> None:
        self._lines.append(node)

    def leave_SimpleStatementLine(self, original_node: cst.SimpleStatementLine) -> None:
        self._lines.pop()

    def visit_Assign(self, node: cst.Assign) -> None:
        if len(node.targets) == 1:
            self._assignment(node, node.targets[0].target)

    def visit_AnnAssign(self, node: cst.AnnAssign) -> None:
        self._assignment(node, node.target)

    def visit_Import(self, node: cst.Import) -> None:
        self._import(node, node.names)

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        self._import(node, node.names)

    def visit_Call(self, node: cst.Call) -> None:
        start, end = self._span(node.func)
        self.calls.append(Call(self.source.text(start, end), start, end))

    def visit_Expr(self, node: cst.Expr) -> None:
        self._docstrings.add(node.value)

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        self._string(node)

    def visit_FormattedString(self, node: cst.FormattedString) -> None:
        self._string(node)

    def _string(self, node: cst.CSTNode) -> None:
        if node not in self._docstrings:
            start, end = self._span(node)
            self.verbatim_lines.update(range(self.source.line_of(start) + 1, self.source.line_of(end) + 1))

    def _span(self, node: cst.CSTNode) -> tuple[int, int]:
        span: Any = self.get_metadata(ByteSpanPositionProvider, node)
        return span.start, span.start + span.length

    def _line_span(self, node: cst.CSTNode) -> tuple[int, int]:
        start, end = self._span(node)
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)) and node.decorators:
            start = self._span(node.decorators[0])[0]
        start = self.source.line_start(start)
        end = self.source.line_end(end)
        if isinstance(node, cst.BaseCompoundStatement):
            end = self.source.end_with_comments(end, self.source.indent(start))
        return start, end

    def _numbered(self, name: str) -> str:
        path = ".".join([*(part for part, _ in self._scope), name])
        count = 2
        numbered = path
        while numbered in self.symbols:
            numbered = f"{path}#{count}"
            count += 1
        return numbered

    def _enter(self, node: cst.FunctionDef | cst.ClassDef) -> None:
        path = self._numbered(node.name.value)
        self.symbols[path] = Symbol(path, node, *self._line_span(node), self._blocks[-1], True)
        self._scope.append((path.rpartition(".")[2], node))

    def _assignment(self, node: cst.Assign | cst.AnnAssign, target: cst.BaseExpression) -> None:
        if isinstance(target, cst.Name) and not (self._scope and isinstance(self._scope[-1][1], cst.FunctionDef)):
            path = self._numbered(target.value)
            alone = bool(self._lines) and len(self._lines[-1].body) == 1
            self.symbols[path] = Symbol(path, node, *self._line_span(node), self._blocks[-1], alone)

    def _import(self, node: cst.Import | cst.ImportFrom, aliases: Iterable[cst.ImportAlias] | cst.ImportStar) -> None:
        if self._scope:
            return
        if isinstance(aliases, cst.ImportStar):
            names, spans = ("*",), (self._span(aliases),)
        else:
            names = tuple(alias.evaluated_alias or alias.evaluated_name for alias in aliases)
            spans = tuple(self._span(alias) for alias in aliases)
        alone = bool(self._lines) and len(self._lines[-1].body) == 1
        self.imports.append(
            ImportStatement(names, spans, *self._span(node), self._blocks[-1], self._line_span(node), alone)
        )
