"""config.yaml names every key there is, so that a reader of it has seen them all."""

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dicomnode.conditions import Condition
from dicomnode.config import NodeConfig

SHIPPED = Path(__file__).parents[1] / "config.yaml"


def _keys(kind: Any, path: str) -> Iterator[str]:
    """Every key below a section, mappings and lists passed through: `peers.*.port`."""
    if kind is Condition:
        return
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            below = f"{path}.{field.name}" if path else field.name
            yield below
            yield from _keys(hints[field.name], below)
    elif typing.get_origin(kind) is Mapping:
        yield from _keys(typing.get_args(kind)[1], path)
    elif typing.get_origin(kind) is tuple:
        yield from _keys(typing.get_args(kind)[0], path)


def _mentioned(value: Any, path: str, kind: Any) -> Iterator[str]:
    if typing.get_origin(kind) is Mapping:
        for item in (value or {}).values():
            yield from _mentioned(item, path, typing.get_args(kind)[1])
    elif typing.get_origin(kind) is tuple:
        for item in value or ():
            yield from _mentioned(item, path, typing.get_args(kind)[0])
    elif dataclasses.is_dataclass(kind) and kind is not Condition:
        hints = typing.get_type_hints(kind)
        for key, item in value.items():
            below = f"{path}.{key}" if path else key
            yield below
            yield from _mentioned(item, below, hints[key])


KEYS = sorted(_keys(NodeConfig, ""))


@pytest.fixture(scope="module")
def mentioned() -> set[str]:
    return set(_mentioned(yaml.safe_load(SHIPPED.read_text("utf-8")), "", NodeConfig))


@pytest.mark.parametrize("key", KEYS)
def test_config_yaml_names_the_key(key: str, mentioned: set[str]) -> None:
    assert key in mentioned


def test_the_tree_of_keys_is_walked_to_its_leaves() -> None:
    assert {"node.ae_title", "peers.retry_for_hours", "routes.allow_lossy"} <= set(KEYS)
