"""What a route asks of one attribute of a series, read from config.yaml."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from dicomnode.schema import Builder

PATTERNS: dict[str, Any] = {
    "anyOf": [
        {"type": ["string", "number"]},
        {"type": "array", "minItems": 1, "items": {"type": ["string", "number"]}},
    ]
}


@dataclass(frozen=True, slots=True)
class Condition:
    """What one attribute of a series must be; every part that is given must hold."""

    present: bool | None = None
    any: tuple[str, ...] | None = None
    """Patterns with ``*`` and ``?``, without regard to case; one must match one value."""
    none_of: tuple[str, ...] | None = None
    min: float | None = None
    max: float | None = None
    regex: str | None = None

    SHAPE: ClassVar[dict[str, Any]] = {
        "description": "a scalar, a list (any of), or present, not, min, max, regex, any",
        "anyOf": [
            *PATTERNS["anyOf"],
            {
                "type": "object",
                "additionalProperties": False,
                "minProperties": 1,
                "properties": {
                    "present": {"type": "boolean"},
                    "any": PATTERNS,
                    "not": PATTERNS,
                    "min": {"type": "number"},
                    "max": {"type": "number"},
                    "regex": {"type": "string"},
                },
            },
        ],
    }

    @classmethod
    def read(cls, builder: Builder, value: Any, where: str) -> "Condition":
        """A scalar, a list (any of), or a mapping of present, not, min, max, regex, any."""
        if not isinstance(value, dict):
            return cls(any=_patterns(builder, value, where))
        parts: dict[str, Any] = {}
        for key, part in value.items():
            inner = f"{where}.{key}"
            if key in ("any", "not"):
                name = "any" if key == "any" else "none_of"
                parts[name] = _patterns(builder, part, inner)
            elif key in ("min", "max"):
                parts[key] = builder.build(float, part, inner)
            elif key == "present":
                parts[key] = builder.build(bool, part, inner)
            elif key == "regex":
                parts[key] = _regex(builder, part, inner)
            else:
                builder.fail(inner, "unknown; known here: present, not, min, max, regex, any")
        if not value:
            builder.fail(where, "says nothing; use {present: true}")
        return cls(**parts)


def _patterns(builder: Builder, value: Any, where: str) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    if not items or not all(type(item) in (str, int, float) for item in items):
        builder.fail(where, "expected a text, a number or a list of them (dates in quotes)")
        return ()
    return tuple(str(item) for item in items)


def _regex(builder: Builder, value: Any, where: str) -> str:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        builder.fail(where, f"not a regular expression: {error}")
    return str(value)
