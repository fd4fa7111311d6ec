"""The reference of a scenario's fields, from the models that read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from inspect import cleandoc
from typing import Any

import yaml

from servecast.sim.scenario.scenario import Scenario

Schema = Mapping[str, Any]

INTRODUCTION = """# Scenario reference

A scenario is one YAML file: model, GPU, engine, traffic, objectives, and, where a benchmark was
published, its tables. Unknown fields are refused, and paths are relative to the file's folder.
Numbers carry no units; the field's name says them (`duration_s`, `kv_cache_memory_bytes`), rates
are requests a second, lengths are tokens.

Editors complete and check the file with the JSON schema that comes with servecast,
`scenarios/scenario.schema.json`:

```yaml
# yaml-language-server: $schema=scenarios/scenario.schema.json
```

Any field can be changed for one run, by its dotted path: `--set sweep.levels.0.concurrency=2`.
"""


def page() -> str:
    """The page: the fields of a scenario and of every model in it, in the order a reader meets them."""
    schema = Scenario.model_json_schema()
    definitions: Schema = schema["$defs"]
    parts = [INTRODUCTION.rstrip(), _section("Scenario", schema, definitions)]
    parts += [
        _section(name, definitions[name], definitions) for name in _in_reading_order(schema, definitions)
    ]
    return "\n\n".join(parts) + "\n"


def fields_of(definition: Schema) -> Schema:
    """The properties of a definition; one with a shorthand has them in its last alternative."""
    properties: Schema = _object(definition).get("properties", {})
    return properties


def _object(definition: Schema) -> Schema:
    whole: Schema = definition["anyOf"][-1] if "anyOf" in definition else definition
    return whole


def _section(name: str, definition: Schema, definitions: Schema) -> str:
    whole = _object(definition)
    required = whole.get("required", [])
    lines = [f"## {name}", "", _prose(whole.get("description", "")), ""]
    rows = []
    for field, prop in fields_of(definition).items():
        shown, default = _type(prop, definitions), prop.get("default")
        standard = "" if default is None else f"`{_yaml(default)}`"
        if "\n" in standard:  # a whole object: its own section has the defaults
            standard = "its own"
        if field in required:
            standard = "required"
        meaning = "Which form this is." if field == "kind" else _prose(prop["description"])
        rows.append(f"| `{field}` | {shown} | {standard} | {meaning} |")
    if rows:
        lines += ["| field | type | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join(lines).rstrip()


def _in_reading_order(schema: Schema, definitions: Schema) -> list[str]:
    """Definitions as a reader meets them, depth first."""
    order: list[str] = []

    def visit(node: Any) -> None:
        for name in _references(node):
            if name not in order:
                order.append(name)
                visit(definitions[name])

    visit(schema["properties"])
    return order


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "$ref" in node:
            yield str(node["$ref"]).rsplit("/", 1)[-1]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _type(prop: Schema, definitions: Schema) -> str:
    if "$ref" in prop:
        name = prop["$ref"].rsplit("/", 1)[-1]
        link = f"[{name}](#{name.lower()})"
        shorthand = definitions[name].get("anyOf", [{}])[0]
        return f"whole number ≥ 1 or {link}" if shorthand.get("type") == "integer" else link
    if "anyOf" in prop or "oneOf" in prop:
        kinds = [each for each in prop.get("anyOf") or prop["oneOf"] if each.get("type") != "null"]
        return ", ".join(dict.fromkeys(_type(each, definitions) for each in kinds))
    if "const" in prop:
        return f"`{_yaml(prop['const'])}`"
    if "enum" in prop:
        return ", ".join(f"`{_yaml(value)}`" for value in prop["enum"])
    kind = prop.get("type")
    if kind == "array":
        return f"list of {_type(prop.get('items', {}), definitions)}"
    if kind == "object":
        values = prop.get("additionalProperties")
        return f"mapping of name to {_type(values if isinstance(values, dict) else {}, definitions)}"
    if kind == "string":
        return "path" if prop.get("format") in ("path", "file-path") else "text"
    if kind == "boolean":
        return "`true`, `false`"
    bounds = [
        f"{sign} {prop[key]:g}"
        for key, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", "≥"),
            ("exclusiveMaximum", "<"),
            ("maximum", "≤"),
        )
        if key in prop
    ]
    return " ".join(["whole number" if kind == "integer" else "number", " and ".join(bounds)]).strip()


def _prose(description: str) -> str:
    """A docstring as Markdown, a line a paragraph."""
    paragraphs = cleandoc(description).split("\n\n")
    return "\n\n".join(" ".join(each.split()) for each in paragraphs).replace("``", "`")


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
