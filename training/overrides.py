"""Settings of a run as plain values: a YAML file with ``key=value`` over it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dicomnode.errors import ConfigError


def read_settings(path: Path, overrides: Sequence[str] = ()) -> Any:
    """The plain values of a file with its overrides, unchecked.

    Raises:
        ConfigError: the file cannot be read, or an override names no place in it.
    """
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override}: want key=value, with dots for nested keys")
        try:
            _set(data, key.split("."), yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise ConfigError(
                f"{key}: {value} is no YAML; put it in quotes: '{key}=\"{value}\"'"
            ) from error
    return data


def _set(data: Any, keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(data, dict) or not isinstance(data.get(key, {}), dict):
            raise ConfigError(f"{'.'.join(keys)}: {key} has no keys below it")
        data = data.setdefault(key, {})
    data[keys[-1]] = value
