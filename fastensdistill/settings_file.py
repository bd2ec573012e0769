"""Settings in YAML: what ``--config`` reads and what a run's ``config.yaml`` holds.

Values are read as text and understood as flags are: what YAML 1.1 makes of 1e-3 (a string), 010 (eight), 1:30 (ninety)
and no (false) is nobody's setting. A key stands once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from fastensdistill.errors import InputError, unknown
from fastensdistill.files import expanded
from fastensdistill.settings import Setting

LARGEST = 1 << 20  # bytes; a larger file is another one, such as a network's


class _Loader(yaml.SafeLoader):
    """Of plain values, null alone is more than text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as the class above has it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if isinstance(key, str) and key in found:
                raise InputError(f"{key!r} stands twice, in lines {found[key]} and {line}; expected once")
            if isinstance(key, str):
                found[key] = line
        return super().construct_mapping(node, deep)


def read_settings(path: str | Path, known: Mapping[str, Setting]) -> dict[str, Any]:
    """The settings in a YAML file; none in an empty one. Raises InputError that names the file and the key."""
    path = expanded(path)
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise InputError(f"is not YAML: more than {LARGEST:,} bytes")
        loaded = yaml.load(text, _Loader)
    except OSError as error:
        raise InputError(f"cannot read config {path}: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InputError(f"{path}: is not YAML: {line}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = getattr(error, "reason", None) or "lists in lists without end"
        raise InputError(f"{path}: is not YAML: {reason}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        kind = "a list" if isinstance(loaded, list) else "text" if isinstance(loaded, str) else type(loaded).__name__
        raise InputError(f"{path}: expected a mapping of settings, such as 'epochs: 200', got {kind}")
    for key in loaded:
        if key not in known:
            raise InputError(f"{path}: {unknown('setting', str(key), known)}")
    return {key: known[key].value(value, f"{path}: {key}") for key, value in loaded.items()}


def to_yaml(config: Any) -> str:
    """A config dataclass as flat YAML. ``resume`` is of one call, not of the settings: given again, they begin anew."""
    values = {k: _plain(v) for k, v in asdict(config).items()}
    return yaml.safe_dump(values | ({"resume": False} if "resume" in values else {}), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
