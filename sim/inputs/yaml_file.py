"""The YAML behind a scenario: reading it strictly, and replacing single fields."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import read_text


class _Loader(yaml.SafeLoader):
    """YAML without keys that come twice."""


class _Quick(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same by libyaml, ten times as fast, whose messages are not as good."""


def _mapping(loader: Any, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: list[Any] = []
    for key_node, _ in node.value:
        if key_node.tag != "tag:yaml.org,2002:merge":
            key = loader.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} comes twice", key_node.start_mark
                )
            seen.append(key)
    loader.flatten_mapping(node)
    return {
        loader.construct_object(key, deep=True): loader.construct_object(value, deep=True)
        for key, value in node.value
    }


for each in (_Loader, _Quick):
    each.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's fields.

    Raises:
        InputError: it cannot be read, is no YAML, has a key twice, or is not a mapping.
    """
    return parse_yaml(read_text(path, fix="Give a readable file."), source=str(path))


def parse_yaml(text: str, *, source: str) -> dict[str, Any]:
    """The fields of a YAML text; ``source`` is the file in messages. Raises InputError as ``read_yaml``."""
    try:
        data = _read(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        what = f"not valid YAML: {problem}"
        raise InputError(what, where=f"{source}{line}", fix="Correct the line.") from None
    if not isinstance(data, dict):
        raise InputError("not a mapping of fields", where=source, fix="See the scenario reference.")
    return data


def _read(text: str) -> Any:
    try:
        return yaml.load(text, _Quick)
    except (yaml.YAMLError, ValueError):
        return yaml.load(text, _Loader)


def override(data: dict[str, Any], field: str, value: Any, *, where: str) -> dict[str, Any]:
    """A copy of a scenario's data with one field, given by its dotted path, set to a value.

    Raises:
        InputError: the path leads through something that has no fields.
    """
    data = copy.deepcopy(data)
    node: Any = data
    *parents, last = field.split(".")
    for part in parents:
        node = node.setdefault(part, {}) if isinstance(node, dict) else _item(node, part, field, where)
    if isinstance(node, dict):
        node[last] = value
    else:
        _item(node, last, field, where)
        node[int(last)] = value
    return data


def _item(node: Any, part: str, field: str, where: str) -> Any:
    if isinstance(node, list | tuple) and part.isdecimal() and int(part) < len(node):
        return node[int(part)]
    what = f"there is nothing at {part!r} of {field!r}"
    raise InputError(what, where=where, fix="Give the field's dotted path.")
