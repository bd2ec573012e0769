"""A setting: a field of a config dataclass with its description, type and range of values.

Python, YAML files and flags all come to :meth:`Setting.value`, so that they refuse the same values in the same words.
A setting's meaning is the string that follows the field in the source; ``--help`` and ``help()`` both print it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import math
import operator
import os
import reprlib
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastensdistill.errors import InputError, unknown
from fastensdistill.files import expanded

TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def setting(
    default: Any, *, least: float | None = None, most: float | None = None, above: float | None = None,
    below: float | None = None, choices: Iterable[str] | None = None, check: Callable[[Any], object] | None = None,
    positional: bool = False,
) -> Any:  # fmt: skip
    """A field of a config whose values, each of them where there may be several, have bounds or are among ``choices``.

    ``check`` is called with a value and raises InputError; a ``positional`` one needs no flag on the command line.
    """
    rules = {"least": least, "most": most, "above": above, "below": below, "check": check, "positional": positional}
    return field(default=default, metadata={**rules, "choices": None if choices is None else tuple(choices)})


class Settings:
    """The base of all configs: values of a wrong type or out of range are refused, and ``help()`` names every field.

    NumPy's numbers, lists for tuples and strings for paths are understood. Raises InputError.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        own: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            own |= dict.fromkeys(vars(base).get("__annotations__", ()), "") if base is not object else {}
            own |= meanings(base)
        paragraphs = [textwrap.fill(f"{name}: {text}", 100, subsequent_indent="    ") for name, text in own.items()]
        cls.__doc__ = "\n\n".join([cls.__doc__ or cls.__name__, "\n".join(paragraphs)]).strip()

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for s in settings_of(cls).values():
            setattr(self, s.name, s.value(getattr(self, s.name)))


@dataclass(frozen=True)
class Setting:
    """One field. ``kind`` is int, float, bool, str or Path; of ``many`` there is a tuple."""

    name: str
    kind: type
    many: bool = False
    optional: bool = False
    default: Any = None
    meaning: str = ""
    group: str = ""
    choices: tuple[str, ...] | None = None
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    check: Callable[[Any], object] | None = None
    positional: bool = False

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def expected(self) -> str:
        """In words, what a value must be."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.least is not None and self.most is not None:
            words = f"from {_bound(self.least)} to {_bound(self.most)}"
        else:
            bounds = {"of at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
            words = " and ".join(f"{word} {_bound(b)}" for word, b in bounds.items() if b is not None)
        many = {"a whole number": "whole numbers", "a number": "numbers", "a path": "paths"} if self.many else {}
        return f"{many.get(KINDS[self.kind], KINDS[self.kind])} {words}".strip()

    def value(self, given: Any, where: str | None = None) -> Any:
        """``given`` as the field holds it. Raises InputError for what does not fit.

        ``where`` is the flag, or the file and the key, that ``given`` comes from: there, numbers are text.
        """
        text = where is not None
        if given is None or (text and self.optional and self.kind in (int, float) and given in ("none", "None")):
            if self.optional:
                return None
            raise self.refusal(given, where)
        if not self.many:
            return self._one(given, where, given)
        return tuple(self._one(item, where, given) for item in self._items(given, where))

    def _items(self, given: Any, where: str | None) -> list[Any]:
        if isinstance(given, dict):
            raise self.refusal(given, where)
        given = given.tolist() if hasattr(given, "tolist") else given
        items = [given] if isinstance(given, str | bytes | os.PathLike) or not hasattr(given, "__iter__") else [*given]
        if where is None or self.kind is Path:
            return items
        return [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]

    def _one(self, item: Any, where: str | None, whole: Any) -> Any:
        try:
            value = _CONVERTERS[self.kind](item, where is not None)
            if value is None or not self._in_range(value):
                raise self.refusal(item if where else whole, where)
            if self.check is not None:
                self.check(value)
            if self.choices is not None and value not in self.choices:
                raise unknown("value" if where else self.name.replace("_", " "), value, self.choices)
        except (TypeError, ValueError, ArithmeticError):
            raise self.refusal(item if where else whole, where) from None
        except InputError as error:
            raise InputError(f"{where}: {error}") if where and where not in str(error) else error from None
        return value

    def _in_range(self, value: Any) -> bool:
        if self.kind not in (int, float):
            return True
        return (
            (self.kind is int or math.isfinite(value))
            and (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above) and (self.below is None or value < self.below)
        )  # fmt: skip

    def refusal(self, given: Any, where: str | None) -> InputError:
        """The error for a value that it does not take: the setting, the value, and what was expected."""
        shown = "nothing" if given is None and where else " ".join(_short.repr(given).split())
        if isinstance(given, str) and _is_number(given):
            shown = given.strip()
        if where is None:
            return InputError(f"{self.name}={shown}: expected {self.expected}")
        return InputError(f"{where}: expected {self.expected}, got {shown}")


@functools.cache
def settings_of(cls: Any) -> dict[str, Setting]:
    """The settings of a config dataclass by name, in the order of their groups."""
    hints = typing.get_type_hints(cls)
    found = {}
    for f in fields(cls):
        owner = next(base for base in cls.__mro__ if f.name in vars(base).get("__annotations__", ()))
        hint, optional = hints[f.name], False
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            optional = True
            hint = next(a for a in typing.get_args(hint) if a is not type(None))
        many = typing.get_origin(hint) is tuple
        found[f.name] = Setting(
            f.name, typing.get_args(hint)[0] if many else hint, many, optional,
            f.default_factory() if f.default_factory is not MISSING else f.default,
            meanings(owner).get(f.name, ""), about(owner), **f.metadata,
        )  # fmt: skip
    return found


def about(cls: type) -> str:
    """What a config says of itself, without the list of its fields."""
    return (cls.__doc__ or "").split("\n\n")[0]


def meanings(cls: type) -> dict[str, str]:
    """The string after each field of ``cls`` itself, as its source has it; none where there is no source."""
    return _sources(cls.__module__).get(cls.__name__, {}) if issubclass(cls, Settings) else {}


@functools.cache
def _sources(module: str) -> dict[str, dict[str, str]]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):
        return {}
    found: dict[str, dict[str, str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for name, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(name, ast.AnnAssign) and isinstance(name.target, ast.Name)
                and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            ):  # fmt: skip
                found.setdefault(node.name, {})[name.target.id] = " ".join(str(text.value.value).split())
    return found


def _bound(value: float) -> str:
    return f"{int(value):,}" if abs(value) < 1e15 and value == int(value) else f"{value:,}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _to_bool(item: Any, text: bool) -> bool | None:
    if isinstance(item, str) and text:
        return TRUTH.get(item.strip().lower())
    return bool(item) if type(item).__name__ in ("bool", "bool_") else None


def _to_float(item: Any, text: bool) -> float | None:
    if isinstance(item, str):
        if not text:
            return None
        above, _, below = item.partition("/")  # as in 8/255
        return float(above) / float(below) if below else float(item)
    return None if type(item).__name__ in ("bool", "bool_") else float(item)


def _to_int(item: Any, text: bool) -> int | None:
    if isinstance(item, str) and text:
        try:
            return int(item)
        except ValueError:
            item = float(item)
    if isinstance(item, str) or type(item).__name__ in ("bool", "bool_"):
        return None
    if hasattr(item, "__index__"):
        return operator.index(item)
    return int(item) if float(item).is_integer() else None  # 1e3


def _to_str(item: Any, text: bool) -> str | None:
    item = os.fspath(item)
    return item if isinstance(item, str) and item.strip() and "\0" not in item else None


def _to_path(item: Any, text: bool) -> Path | None:
    item = _to_str(item, text)
    return None if item is None else expanded(item)


_CONVERTERS: dict[type, Callable[[Any, bool], Any]] = {
    bool: _to_bool, int: _to_int, float: _to_float, str: _to_str, Path: _to_path,
}  # fmt: skip
