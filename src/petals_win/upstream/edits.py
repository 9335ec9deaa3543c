"""Changes to one upstream file, all of them placed in upstream's own text, so that what no change covers stays.

Knows offsets and text. Does not know what the declarations mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import libcst as cst

from petals_win.upstream.patchfile import Code, Declaration
from petals_win.upstream.syntax import ImportStatement, Source, Symbol


@dataclass(frozen=True)
class _Edit:
    start: int
    end: int
    text: str
    by: Declaration
    depth: int = 0


class FileEdits:
    """Collects the changes to one file. `by` is the declaration that wants a change."""

    def __init__(self, source: Source):
        self.source = source
        self._edits: list[_Edit] = []
        self._removed: list[tuple[cst.CSTNode, int, int, Declaration]] = []
        self._unimported: dict[ImportStatement, dict[str, Declaration]] = {}
        self._imports: dict[str, Declaration] = {}

    def put(self, start: int, end: int, text: str, by: Declaration) -> None:
        """`text` takes the place of what lies from start to end."""
        self._edits.append(_Edit(start, end, text, by))

    def replace(self, symbol: Symbol, code: Code, by: Declaration) -> None:
        self.put(symbol.start, symbol.end, code.indented(self.source.indent(symbol.start)) + "\n", by)

    def append(self, end: int, indent: str, code: Code, by: Declaration) -> None:
        """Put a definition after the statement that ends at `end`; into a class if there is an indentation."""
        blank = self._line_break(end) + ("\n" if indent else "\n\n")
        self._edits.append(_Edit(end, end, f"{blank}{code.indented(indent)}\n", by, len(indent)))

    def remove(self, symbol: Symbol, by: Declaration) -> None:
        self._removed.append((symbol.block, symbol.start, symbol.end, by))

    def add_import(self, statement: str, by: Declaration) -> None:
        """Two patches may want the same import: each of them stands on its own."""
        self._imports.setdefault(statement, by)

    def remove_import(self, statement: ImportStatement, name: str, by: Declaration) -> None:
        self._unimported.setdefault(statement, {})[name] = by

    def content(self) -> bytes:
        """The file with all changes, in upstream's encoding and newlines. PatchError if two touch the same text."""
        edits = [*self._edits, *self._import_edits(), *self._removals()]
        # At one place the deepest comes first: a method added to the last class stays in front of a function added to
        # the module. Otherwise the order of the series decides.
        edits.sort(key=lambda edit: (edit.start, edit.end, -edit.depth))
        pieces: list[bytes] = []
        at = 0
        previous = None
        for edit in edits:
            if previous is not None and edit.start < at:
                raise edit.by.refusal(f"{previous.by.patch} changes the same lines ({previous.by.target})")
            pieces += [self.source.data[at : edit.start], edit.text.replace("\n", self.source.newline).encode()]
            at, previous = edit.end, edit
        pieces.append(self.source.data[at:])
        return b"".join(pieces).decode().encode(self.source.encoding)

    def _import_edits(self) -> list[_Edit]:
        edits = []
        for statement, names in self._unimported.items():
            by = next(iter(names.values()))
            kept = [at for at, name in enumerate(statement.names) if name not in names]
            if kept:
                edits.append(_Edit(statement.start, statement.end, self._with_names(statement, kept), by))
            elif statement.alone_on_line:
                self._removed.append((statement.block, *statement.line, by))
            else:
                edits.append(_Edit(statement.start, statement.end, "pass", by))
        if self._imports:
            start, before, after = self._place_of_imports()
            text = before + "\n".join(self._imports) + "\n" + after
            edits.append(_Edit(start, start, text, next(iter(self._imports.values()))))
        return edits

    def _with_names(self, statement: ImportStatement, kept: list[int]) -> str:
        """The statement with some of its names, and of the text between names that which stands before a kept one."""
        spans = statement.spans
        text = self.source.text(statement.start, spans[0][0])
        for order, at in enumerate(kept):
            if order:
                text += self.source.text(spans[at - 1][1], spans[at][0])
            text += self.source.text(*spans[at])
        return (text + self.source.text(spans[-1][1], statement.end)).replace(self.source.newline, "\n")

    def _place_of_imports(self) -> tuple[int, str, str]:
        """Where to put imports, and the newlines around them.

        After the last import at the top level; else after the docstring; else before the first statement.
        """
        at_top = {(start, end) for start, end, _ in self.source.body}
        ends = [statement.line[1] for statement in self.source.imports if statement.line in at_top]
        if ends:
            return max(ends), self._line_break(max(ends)), ""
        if not self.source.body:
            return len(self.source.data), self._line_break(len(self.source.data)), ""
        start, end, first = self.source.body[0]
        if isinstance(first, cst.SimpleStatementLine) and isinstance(first.body[0], cst.Expr):
            return end, self._line_break(end) + "\n", ""
        return start, "", "\n"

    def _line_break(self, end: int) -> str:
        return "" if not end or self.source.data[end - 1 : end] == b"\n" else "\n"

    def _removals(self) -> list[_Edit]:
        """Take statements out with the blank lines before them; a block that would be empty gets a `pass`."""
        edits = []
        blocks = [block for block, *_ in self._removed]
        for order, (block, start, end, by) in enumerate(self._removed):
            emptied = blocks.count(block) == self.source.block_sizes[block] and not isinstance(block, cst.Module)
            if emptied and blocks.index(block) == order:
                edits.append(_Edit(start, end, f"{self.source.indent(start)}pass\n", by))
                continue
            if self.source.is_blank_or_end(end):
                start = self.source.blank_before(start)
            edits.append(_Edit(start, end, "", by))
        return edits
