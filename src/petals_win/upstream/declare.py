"""The declarations that a patch may make. Typed stand-ins that do nothing: a patch is read, never run.

Symbols are written "package.module:Class.method"; "#2" after a name means its second definition in that place. A digest is
what `petals-win patches digest SYMBOL` prints; "?" stands for one that `petals-win patches digest --fill` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def replace(target: str, *, digest: str) -> Callable[[T], T]:
    """The decorated function or class takes the place of the symbol, including the symbol's own decorators."""
    return lambda definition: definition


def add(target: str, *, after: str | None = None) -> Callable[[T], T]:
    """The decorated function or class is added at the end of "module" or "module:Class", or after a symbol there."""
    return lambda definition: definition


def remove(target: str, *, digest: str) -> None:
    """The function, class or assignment goes."""


def set_value(target: str, expression: str, *, digest: str) -> None:
    """The Python expression becomes the right side of an assignment in a module or class."""


def bases(target: str, *names: str, digest: str) -> None:
    """The names, keywords like "metaclass=ABCMeta" included, become the bases of a class; digest: of its old ones."""


def swap_call(target: str, callee: str, new_callee: str, *, digest: str, nth: int = 1) -> None:
    """The nth call of `callee`, as upstream writes it, inside the symbol (or anywhere in "module:") calls another."""


def add_import(target: str, statement: str) -> None:
    """The import statement is added after the last import at the top level of the module."""


def remove_import(target: str, name: str) -> None:
    """The name is no longer bound by the module's imports at the top level, including those in `try` and `if`."""


def redirect_import(target: str, name: str, statement: str) -> None:
    """`remove_import` and `add_import` in one."""


def replace_module(target: str, *, digest: str) -> None:
    """All else in the patch becomes the module. The only declaration of its patch."""


def add_module(target: str) -> None:
    """All else in the patch becomes a module that upstream does not have. The only declaration of its patch."""


def remove_module(target: str, *, digest: str) -> None:
    """The module's file goes."""


def remove_package(target: str, *, digest: str) -> None:
    """The package's folder goes."""
