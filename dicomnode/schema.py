"""Parsed YAML -> frozen dataclasses, and the JSON Schema of the same dataclasses.

Knows nothing of DICOM: `config` declares the keys with `setting`, `Builder` reads them. Every
problem is gathered with the path of its key, so that one look mends the whole file.
"""

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Any, Literal

Check = Callable[[Any], str | None]
"""What is wrong with a value of the right type, or None."""


def setting(
    default: Any = MISSING, doc: str = "", *, check: Check | None = None, secret: bool = False
) -> Any:
    """A key: its default, what it means with its unit, and what is wrong with a value.

    ``secret`` values may be written ``${NAME}`` and are then read from the environment.
    """
    metadata = {"doc": doc, "check": check, "secret": secret}
    if isinstance(default, (dict, list)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Builder:
    """Turns parsed YAML into dataclasses, gathering every problem with the path of its key."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def fail(self, where: str, message: str) -> None:
        self.problems.append(f"{where or 'config.yaml'}: {message}")

    def build(self, kind: Any, value: Any, where: str) -> Any:
        if reader := getattr(kind, "read", None):
            return reader(self, value, where)
        if dataclasses.is_dataclass(kind):
            return self.section(kind, value, where)
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin in (types.UnionType, typing.Union):
            return self.union(args, value, where)
        if origin is Literal:
            if value not in args:
                self.fail(where, f"must be {' or '.join(map(str, args))}, not {value!r}")
            return value
        if origin is tuple:
            return self.sequence(args[0], value, where)
        if origin is Mapping:
            return self.mapping(args[1], value, where)
        return self.scalar(kind, value, where)

    def section(self, kind: Any, value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            self.fail(where, "expected a mapping")
            return None
        hints = typing.get_type_hints(kind)
        dot, values = f"{where}." if where else "", {}
        fields = {item.name: item for item in dataclasses.fields(kind)}
        for key in value:
            if key not in fields:
                self.fail(f"{dot}{key}", f"unknown key; known here: {', '.join(fields)}")
        for name, item in fields.items():
            if name in value:
                values[name] = self.setting(item, hints[name], value[name], f"{dot}{name}")
            elif item.default is MISSING and item.default_factory is MISSING:
                self.fail(f"{dot}{name}", "missing")
        if any(p.startswith(where) for p in self.problems):
            return None
        return kind(**values)

    def setting(self, item: dataclasses.Field[Any], hint: Any, value: Any, where: str) -> Any:
        if item.metadata["secret"] and isinstance(value, str):
            value = self.expand(value, where)
        before = len(self.problems)
        built = self.build(hint, value, where)
        check: Check | None = item.metadata["check"]
        if check and built is not None and len(self.problems) == before and (why := check(built)):
            self.fail(where, why)
        return built

    def expand(self, value: str, where: str) -> str:
        found = re.fullmatch(r"\$\{(\w+)\}", value)
        if not found:
            return value
        if found[1] not in os.environ:
            self.fail(where, f"the environment has no variable {found[1]}")
        return os.environ.get(found[1], "")

    def union(self, args: tuple[Any, ...], value: Any, where: str) -> Any:
        if value is None and type(None) in args:
            return None
        for kind in (a for a in args if a is not type(None)):
            attempt = type(self)()
            built = attempt.build(kind, value, where)
            if not attempt.problems:
                return built
        self.problems += attempt.problems
        return None

    def sequence(self, kind: Any, value: Any, where: str) -> Any:
        if not isinstance(value, list):
            self.fail(where, "expected a list")
            return ()
        return tuple(self.build(kind, item, f"{where}[{i}]") for i, item in enumerate(value))

    def mapping(self, kind: Any, value: Any, where: str) -> Any:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            self.fail(where, "expected a mapping with text keys")
            return {}
        if not all(key.strip() and key.isprintable() for key in value):
            self.fail(where, "a name is empty, or has control characters")
            return {}
        if kind is Any:
            return value
        built = {key: self.build(kind, item, f"{where}.{key}") for key, item in value.items()}
        return types.MappingProxyType(built)

    def scalar(self, kind: Any, value: Any, where: str) -> Any:
        if type(value) is str and not value.isprintable():
            self.fail(where, "control characters are not allowed")
        if kind is Path and isinstance(value, str):
            if not value:
                self.fail(where, "must not be empty")
            return Path(value)
        if kind is float and type(value) is int:
            return float(value) if abs(value) < _MOST else math.inf * (1 if value > 0 else -1)
        if type(value) is not kind:
            self.fail(where, f"expected {_NAMES.get(kind, kind.__name__)}, got {value!r:.60}")
        return value


_MOST = 10**300
"""Whole numbers below it fit in a float."""
_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
}


def json_schema(kind: Any, doc: str = "") -> dict[str, Any]:
    """The JSON Schema (2020-12) of a dataclass or of the type of one of its keys."""
    described = {"description": doc} if doc else {}
    if shape := getattr(kind, "SHAPE", None):
        return {**shape, **described}
    if dataclasses.is_dataclass(kind):
        return {**_object_schema(kind), **described}
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [json_schema(arg) for arg in args], **described}
    if origin is Literal:
        return {"enum": list(args), **described}
    if origin is tuple:
        return {"type": "array", "items": json_schema(args[0]), **described}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": json_schema(args[1]), **described}
    return {**_SCALARS.get(kind, {}), **described}


_SCALARS: dict[Any, dict[str, str]] = {
    str: {"type": "string"},
    Path: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    type(None): {"type": "null"},
}


def _object_schema(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    required = [f.name for f in fields if f.default is MISSING and f.default_factory is MISSING]
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": {
            f.name: json_schema(hints[f.name], f.metadata.get("doc", "")) for f in fields
        },
    }
