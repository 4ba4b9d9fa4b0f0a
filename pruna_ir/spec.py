"""Pipeline text: the grammar, its parser and its printer.

    pipeline := item (',' item)*
    item     := name options? | scope
    scope    := name ('<' glob '>')? '(' pipeline? ')'
    options  := '{' (key '=' value (',' key '=' value)*)? '}'
    value    := word | number | 'true' | 'false' | 'none' | "quoted" | '[' values ']' | '@' path

``parse_pipeline(print_pipeline(p)) == p`` for every pipeline. Text errors carry a caret. ``@path``
stands for the JSON value in a file and is read when passes are made from the text.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

from pruna_ir.errors import UsageError


@dataclass(frozen=True)
class FileValue:
    """An option value that stands in a JSON file."""

    path: str


Value = bool | int | float | str | None | FileValue | tuple["Value", ...]


@dataclass(frozen=True)
class PassSpec:
    """A pass by name, with the options that were given."""

    name: str
    options: tuple[tuple[str, Value], ...] = ()


@dataclass(frozen=True)
class ScopeSpec:
    """A scope such as ``fixpoint(...)`` or ``submodule<layer*>(...)`` around a pipeline."""

    name: str
    argument: str
    items: tuple[PassSpec | ScopeSpec, ...]


Item = PassSpec | ScopeSpec

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_WORD = re.compile(r"[A-Za-z0-9_.:/*+-]+")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./*-]*")
_KEYWORDS: dict[str, Value] = {"true": True, "false": False, "none": None}
_NUMBERS = frozenset({"nan", "inf", "infinity"})


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def error(self, message: str, at: int | None = None) -> UsageError:
        column = self.at if at is None else at
        line = self.text.replace("\n", " ")
        return UsageError(f"{message}\n  {line}\n  {' ' * column}^")

    def skip_space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def peek(self) -> str:
        self.skip_space()
        return self.text[self.at] if self.at < len(self.text) else ""

    def accept(self, symbol: str) -> bool:
        if self.peek() != symbol:
            return False
        self.at += 1
        return True

    def expect(self, symbol: str, what: str) -> None:
        if not self.accept(symbol):
            raise self.error(f"expected '{symbol}' {what}")

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        self.skip_space()
        found = pattern.match(self.text, self.at)
        if found is None:
            raise self.error(f"expected {what}")
        self.at = found.end()
        return found.group()

    def pipeline(self, end: str) -> tuple[Item, ...]:
        items: list[Item] = []
        if self.peek() == end:
            return ()
        items.append(self.item())
        while self.accept(","):
            items.append(self.item())
        return tuple(items)

    def item(self) -> Item:
        name = self.match(_NAME, "the name of a pass or scope")
        argument = ""
        if self.accept("<"):
            argument = self.until(">")
            if self.peek() != "(":
                raise self.error(f"expected '(' after {name}<{argument}>")
        if self.accept("("):
            items = self.pipeline(")")
            self.expect(")", f"to close {name}(")
            return ScopeSpec(name, argument, items)
        return PassSpec(name, self.options(name) if self.accept("{") else ())

    def until(self, symbol: str) -> str:
        end = self.text.find(symbol, self.at)
        if end < 0:
            raise self.error(f"expected '{symbol}'")
        found, self.at = self.text[self.at : end], end + 1
        return found

    def options(self, name: str) -> tuple[tuple[str, Value], ...]:
        options: dict[str, Value] = {}
        while self.peek() != "}":
            self.skip_space()
            start = self.at
            key = self.match(_NAME, f"an option of {name}, such as key=value")
            if key in options:
                raise self.error(f"option {key} of {name} is given twice", start)
            self.expect("=", f"after option {key} of {name}")
            options[key] = self.value()
            if not self.accept(","):
                break
        self.expect("}", f"to close the options of {name}")
        return tuple(options.items())

    def value(self) -> Value:
        first = self.peek()
        if first == '"':
            return str(json.loads(self.match(_QUOTED, "a quoted string that ends")))
        if first == "@":
            self.at += 1
            path = self.value()
            if not isinstance(path, str):
                raise self.error("expected a file's path after '@'")
            return FileValue(path)
        if first == "[":
            return self.values()
        return _word_value(self.match(_WORD, "a value"))

    def values(self) -> tuple[Value, ...]:
        self.expect("[", "to open a list")
        items: list[Value] = []
        while self.peek() != "]":
            items.append(self.value())
            if not self.accept(","):
                break
        self.expect("]", "to close a list")
        return tuple(items)


def _word_value(word: str) -> Value:
    if word in _KEYWORDS:
        return _KEYWORDS[word]
    for kind in (int, float):
        try:
            return kind(word) if "_" not in word else word
        except ValueError:
            continue
    return word


def parse_pipeline(text: str) -> tuple[Item, ...]:
    """Parse pipeline text.

    Raises:
        UsageError: the text is malformed; the message points at the place.

    >>> parse_pipeline("canonicalize,prune{ratio=0.5}")[1].options
    (('ratio', 0.5),)
    """
    parser = _Parser(text)
    items = parser.pipeline("")
    if parser.peek():
        raise parser.error("expected ',' or the end of the pipeline")
    return items


def print_pipeline(items: tuple[Item, ...]) -> str:
    """The inverse of `parse_pipeline`."""
    return ",".join(map(_print_item, items))


def _print_item(item: Item) -> str:
    if isinstance(item, ScopeSpec):
        argument = f"<{item.argument}>" if item.argument else ""
        return f"{item.name}{argument}({print_pipeline(item.items)})"
    if not item.options:
        return item.name
    options = ",".join(f"{key}={print_value(value)}" for key, value in item.options)
    return f"{item.name}{{{options}}}"


def print_value(value: Value) -> str:
    """One option value as pipeline text."""
    if isinstance(value, tuple):
        return f"[{','.join(map(print_value, value))}]"
    if isinstance(value, FileValue):
        return f"@{print_value(value.path)}"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return repr(value)
    plain = _PLAIN.fullmatch(value) and value not in _KEYWORDS and value.lower() not in _NUMBERS
    return value if plain else json.dumps(value)


def print_pass(instance: Any) -> str:
    """A pass object as pipeline text: its name and the options that differ from the default."""
    return _print_item(pass_spec(instance))


def pass_spec(instance: Any) -> PassSpec:
    """The spec from which the same pass object can be made again."""
    options = tuple(
        (f.name, getattr(instance, f.name))
        for f in dataclasses.fields(instance)
        if not _is_default(f, getattr(instance, f.name))
    )
    return PassSpec(instance.name, options)


def _is_default(f: dataclasses.Field[Any], value: Any) -> bool:
    if f.default_factory is not dataclasses.MISSING:
        return bool(value == f.default_factory())
    return f.default is not dataclasses.MISSING and bool(value == f.default)
