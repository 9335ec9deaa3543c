"""Patches applied to upstream's files, in memory: files in, files out.

Knows what each declaration does and when it is refused. Does not know where files come from or go to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import libcst as cst

from petals_win.upstream.claims import Claims
from petals_win.upstream.digest import UNFILLED, digest_of, digest_of_files
from petals_win.upstream.edits import FileEdits
from petals_win.upstream.errors import PatchError
from petals_win.upstream.patchfile import Declaration, Patch
from petals_win.upstream.syntax import Source, Symbol, decode


def apply_patches(patches: Sequence[Patch], upstream: Mapping[str, bytes]) -> dict[str, bytes]:
    """The patched files by their paths ("package/module.py"). Raises PatchError; then nothing is applied."""
    applier = _Applier(upstream)
    for patch in patches:
        for declaration in patch.declarations:
            applier.take(declaration)
    return applier.result()


def present_digest(declaration: Declaration, upstream: Mapping[str, bytes]) -> str:
    """The digest that the declaration would have to state now. Raises PatchError if its symbol is missing."""
    return _Applier(upstream).digest(declaration)


class _Applier:
    """Takes all declarations first, each checked against upstream as it is; the text is changed at the end."""

    def __init__(self, upstream: Mapping[str, bytes]):
        self.upstream = upstream
        self.files = dict(upstream)
        self.sources: dict[str, Source] = {}
        self.edits: dict[str, FileEdits] = {}
        self.claims = Claims()

    def take(self, d: Declaration) -> None:
        folder = d.patch.partition("/")[0]
        if d.module.partition(".")[0] != folder:
            raise d.refusal(
                f"a patch in patches/{folder} changes {folder} only. Move it to the folder of its package."
            )
        if "digest" in d.arguments:
            self._check_digest(d)
        handler: Callable[[Declaration], None] = getattr(self, f"_{d.kind}")
        handler(d)

    def result(self) -> dict[str, bytes]:
        for path, edits in self.edits.items():
            self.files[path] = edits.content()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # upstream's own, which concern its authors
            for path in sorted(self.files):
                if path.endswith(".py"):
                    self._compile(path)
        return self.files

    def _compile(self, path: str) -> None:
        try:
            compile(self.files[path], path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as e:
            patches = ", ".join(self.claims.patches_in(path)) or "upstream"
            raise PatchError(patches, path, f"the result is not valid Python ({e})") from e

    # Looking things up

    def path_of(self, d: Declaration) -> str:
        stem = d.module.replace(".", "/")
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in self.upstream:
                return path
        raise d.refusal("upstream has no such module")

    def edits_of(self, d: Declaration) -> FileEdits:
        return self.edits.setdefault(self.path_of(d), FileEdits(self.source_of(d)))

    def source_of(self, d: Declaration) -> Source:
        path = self.path_of(d)
        if path not in self.sources:
            try:
                self.sources[path] = Source(self.upstream[path])
            except ValueError as e:
                raise d.refusal(str(e)) from e
        return self.sources[path]

    def symbol_of(self, d: Declaration, path: str) -> Symbol:
        symbol = self.source_of(d).symbols.get(path)
        if symbol is None:
            raise d.refusal(f"upstream's module has no symbol {path}")
        return symbol

    def package_of(self, d: Declaration) -> dict[str, bytes]:
        prefix = d.module.replace(".", "/") + "/"
        files = {path: content for path, content in self.upstream.items() if path.startswith(prefix)}
        if not files:
            raise d.refusal("upstream has no such package")
        return files

    def digest(self, d: Declaration) -> str:
        if d.kind == "remove_package":
            return digest_of_files(self.package_of(d))
        if not d.symbol:
            return digest_of(decode(self.upstream[self.path_of(d)])[0])
        source, symbol = self.source_of(d), self.symbol_of(d, d.symbol)
        if d.kind == "bases":
            start, end = self._parentheses(d, symbol)
            return digest_of(source.text(start, end)[1:-1])
        return digest_of(source.text(symbol.start, symbol.end))

    def _check_digest(self, d: Declaration) -> None:
        stated, present = d.arguments["digest"], self.digest(d)
        fill = f"petals-win patches digest --fill patches/{d.patch}"
        if stated == UNFILLED:
            raise d.refusal(f"its digest is not filled in. Run: {fill}")
        if stated != present:
            raise d.refusal(
                f"the patch is stale: upstream's source has the digest {present} and no longer {stated}. "
                f'Adapt the patch, write digest="?" and run: {fill}'
            )

    def claim(self, d: Declaration, symbol: str, part: str = "", shared: bool = False) -> None:
        """Reserve a symbol of an upstream module, or only a part of it that has no name of its own."""
        names = symbol.split(".") if symbol else []
        self.claims.add(d, [*self.path_of(d).split("/"), *names, *([part] if part else [])], shared)

    def claim_new(self, d: Declaration, scope: str, name: str) -> None:
        """Reserve a name that upstream must not have in that scope."""
        path = f"{scope}.{name}" if scope else name
        source = self.source_of(d)
        imported = not scope and any(name in statement.names for statement in source.imports)
        if path in source.symbols or imported:
            raise d.refusal(f"upstream has {path} already: use replace")
        self.claim(d, path)

    # Definitions

    def _replace(self, d: Declaration) -> None:
        assert d.code is not None
        symbol = self.symbol_of(d, d.symbol)
        if not isinstance(symbol.node, (cst.FunctionDef, cst.ClassDef)):
            raise d.refusal("it is an assignment: use set_value")
        self.claim(d, d.symbol)
        scope, _, name = d.symbol.rpartition(".")
        if d.code.name != name.partition("#")[0]:
            self.claim_new(d, scope, d.code.name)
        self.edits_of(d).replace(symbol, d.code, d)

    def _add(self, d: Declaration) -> None:
        assert d.code is not None
        source = self.source_of(d)
        end, indent = len(source.data), ""
        if d.symbol:
            symbol = self.symbol_of(d, d.symbol)
            if not isinstance(symbol.node, cst.ClassDef) or not isinstance(symbol.node.body, cst.IndentedBlock):
                raise d.refusal("it is no class with lines of its own")
            first, _ = source.spans[symbol.node.body.body[0]]
            end, indent = symbol.end, source.indent(source.line_start(first))
        if after := d.arguments["after"]:
            end = self.symbol_of(d, f"{d.symbol}.{after}" if d.symbol else after).end
        self.claim_new(d, d.symbol, d.code.name)
        self.edits_of(d).append(end, indent, d.code, d)

    def _remove(self, d: Declaration) -> None:
        symbol = self.symbol_of(d, d.symbol)
        if not symbol.alone_on_line:
            raise d.refusal("it shares its line with other statements")
        self.claim(d, d.symbol)
        self.edits_of(d).remove(symbol, d)

    # Parts of definitions

    def _set_value(self, d: Declaration) -> None:
        symbol = self.symbol_of(d, d.symbol)
        value = symbol.node.value if isinstance(symbol.node, (cst.Assign, cst.AnnAssign)) else None
        if value is None:
            raise d.refusal("it is no assignment of a value")
        self.claim(d, d.symbol)
        self.edits_of(d).put(*self.source_of(d).spans[value], d.arguments["expression"], d)

    def _bases(self, d: Declaration) -> None:
        start, end = self._parentheses(d, self.symbol_of(d, d.symbol))
        self.claim(d, d.symbol, "(bases)")
        names = ", ".join(d.arguments["names"])
        self.edits_of(d).put(start, end, f"({names})" if names else "", d)

    def _parentheses(self, d: Declaration, symbol: Symbol) -> tuple[int, int]:
        """Where the bases stand, parentheses included, or would stand."""
        if not isinstance(symbol.node, cst.ClassDef):
            raise d.refusal("it is no class")
        spans = self.source_of(d).spans
        if isinstance(symbol.node.lpar, cst.LeftParen) and isinstance(symbol.node.rpar, cst.RightParen):
            return spans[symbol.node.lpar][0], spans[symbol.node.rpar][1]
        _, name_end = spans[symbol.node.name]
        return name_end, name_end

    def _swap_call(self, d: Declaration) -> None:
        source = self.source_of(d)
        start, end = 0, len(source.data)
        if d.symbol:
            symbol = self.symbol_of(d, d.symbol)
            start, end = symbol.start, symbol.end
        callee, nth = d.arguments["callee"], d.arguments["nth"]
        calls = [call for call in source.calls if start <= call.start < end and call.callee == callee]
        if not 1 <= nth <= len(calls):
            raise d.refusal(f"it has {len(calls)} calls of {callee}, so call {nth} was not found")
        self.claim(d, d.symbol, "(calls)", shared=True)
        call = calls[nth - 1]
        self.edits_of(d).put(call.start, call.end, d.arguments["new_callee"], d)

    # Imports

    def _add_import(self, d: Declaration) -> None:
        statement = d.arguments["statement"]
        if not _is_import(statement):
            raise d.refusal(f"{statement!r} is no import statement")
        self.claim(d, "", f"(imports of {d.patch})", shared=True)
        self.edits_of(d).add_import(statement, d)

    def _remove_import(self, d: Declaration) -> None:
        name = d.arguments["name"]
        statements = [statement for statement in self.source_of(d).imports if name in statement.names]
        if not statements:
            raise d.refusal(f"upstream's module does not import {name} at its top level")
        self.claim(d, "", f"(import {name})")
        for statement in statements:
            self.edits_of(d).remove_import(statement, name, d)

    def _redirect_import(self, d: Declaration) -> None:
        self._remove_import(d)
        self._add_import(d)

    # Files

    def _replace_module(self, d: Declaration) -> None:
        self.claim(d, "")
        self._write(self.path_of(d), d)

    def _add_module(self, d: Declaration) -> None:
        stem = d.module.replace(".", "/")
        if f"{stem}.py" in self.upstream or f"{stem}/__init__.py" in self.upstream:
            raise d.refusal("upstream has it already: use replace_module")
        if f"{stem.rpartition('/')[0]}/__init__.py" not in self.upstream:
            raise d.refusal("upstream has no package that it could be in")
        self.claims.add(d, f"{stem}.py".split("/"))
        self._write(f"{stem}.py", d)

    def _write(self, path: str, d: Declaration) -> None:
        assert d.code is not None
        self.files[path] = f"{d.code.text}\n".encode()

    def _remove_module(self, d: Declaration) -> None:
        self.claim(d, "")
        del self.files[self.path_of(d)]

    def _remove_package(self, d: Declaration) -> None:
        self.claims.add(d, d.module.split("."))
        for path in self.package_of(d):
            del self.files[path]


def _is_import(statement: str) -> bool:
    try:
        line = cst.parse_statement(statement)
    except cst.ParserSyntaxError:
        return False
    return isinstance(line, cst.SimpleStatementLine) and all(
        isinstance(node, (cst.Import, cst.ImportFrom)) for node in line.body
    )
