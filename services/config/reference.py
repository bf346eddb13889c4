"""Write the reference of a run file's keys: `make keys`, or `python -m services.config.reference`.

KEYS.md has the keys of the training, EVALUATION_KEYS.md those of what looks at its pictures and records it.

Everything in it is from the schema of RunConfig: values and defaults from the fields, meanings from the strings below
them, the text above a table from the docstring of the section's class.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from services.config.run import RunConfig

Schema = dict[str, Any]  # JSON schema

_TITLE = """\
# The keys of a run file

Written by `make keys` from the classes in this folder; edit those, not this file.

One YAML file is one run. An unknown key is an error. Relative paths are taken from the folder in which the command was
started. `deploy/runs/` has examples: `tiny_srpo.yaml` is the demo's; `flux1_dev_srpo.yaml` has the settings published
for FLUX.1-dev with HPS v2.1 (not run by us so far; it needs GPUs). Below, `section[]` is each item of a list of
sections. The sections `evaluation`, `guard`, `comparison` and `tracking` are in
[EVALUATION_KEYS.md](EVALUATION_KEYS.md).
"""
_EVALUATION_TITLE = """\
# The keys of evaluation, guard and record

Written by `make keys` from the classes in this folder; edit those, not this file. All other keys of a run file are in
[KEYS.md](KEYS.md).
"""
_EVALUATION = ("evaluation", "guard", "comparison", "tracking")
_BAR = r"\|"  # in a cell
_HEADER = "| key | values | default | meaning |\n|---|---|---|---|"
_TYPES = {
    "boolean": "`true`, `false`",
    "integer": "whole number",
    "null": "null",
    "number": "number",
    "path": "path",
    "string": "text",
}
_BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
_SCHEDULE, _SECTION = "Schedule", "a section"


class _Definitions(dict[str, Schema]):
    """The schema's classes by name."""

    def find(self, schema: Schema) -> Schema | None:
        """Return the section that a field holds, may hold or lists; None if it holds plain values or schedules."""
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return None if name == _SCHEDULE else self[name]
        parts = [*schema.get("anyOf", ()), *([schema["items"]] if "items" in schema else ())]
        return next((found for part in parts if (found := self.find(part)) is not None), None)


def write_reference() -> dict[str, str]:
    """Return the text of each page by its file's name."""
    schema = RunConfig.model_json_schema()
    definitions = _Definitions(schema["$defs"])
    training = [name for name in schema["properties"] if name not in _EVALUATION]
    sections = [_section("The file", schema), *_sections(schema, "", definitions, training)]
    sections.append(_section("Schedules", definitions[_SCHEDULE]))
    return {
        "KEYS.md": "\n".join([_TITLE, *sections]),
        "EVALUATION_KEYS.md": "\n".join([_EVALUATION_TITLE, *_sections(schema, "", definitions, _EVALUATION)]),
    }


def _sections(schema: Schema, prefix: str, definitions: _Definitions, names: Iterable[str]) -> Iterator[str]:
    """Yield the texts of the sections in `names`, each followed by those in it."""
    for name in names:
        field = schema["properties"][name]
        for choice in field.get("oneOf", ()):
            section = definitions.find(choice)
            assert section is not None
            yield _section(f"{prefix}{name}, kind: {section['properties']['kind']['const']}", section)
        if (section := definitions.find(field)) is not None:
            is_list = field.get("type") == "array"
            title = f"{prefix}{name}{'[]' if is_list else ''}"
            yield _section(title, section)
            yield from _sections(section, f"{title}.", definitions, section["properties"])


def _section(title: str, schema: Schema) -> str:
    required = schema.get("required", ())
    rows = [_row(name, field, name in required) for name, field in schema["properties"].items()]
    return "\n".join([f"## {title}\n", f"{schema['description']}\n", _HEADER, *rows, ""])


def _row(name: str, field: Schema, is_required: bool) -> str:
    values, default = _values(field), "required" if is_required else _default(field["default"])
    if values == _SECTION and default.startswith("`{"):
        default = "its defaults"
    cells = (f"`{name}`", values, default, " ".join(field["description"].split()))
    return f"| {' | '.join(cell.replace('|', _BAR) for cell in cells)} |"


def _default(value: object) -> str:
    if isinstance(value, dict):  # a schedule
        value = {key: item for key, item in value.items() if item is not None}
    if value is None:
        return "null"
    return f"`{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"


def _values(field: Schema) -> str:
    """Return in words what a field accepts."""
    if "$ref" in field:
        return "a schedule" if field["$ref"].endswith(f"/{_SCHEDULE}") else _SECTION
    if "oneOf" in field:
        return _SECTION
    if "anyOf" in field:
        return " or ".join(_values(part) for part in field["anyOf"])
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", (field.get("const"),)))
    if field["type"] == "array":
        items = field.get("prefixItems")
        if items:
            return f"[{', '.join(map(_values, items))}]"
        return f"list of {_values(field['items'])}".replace(_SECTION, "sections")
    return _TYPES["path" if field.get("format") == "path" else field["type"]] + _bounds(field)


def _bounds(field: Schema) -> str:
    """
    >>> _bounds({"exclusiveMinimum": 0, "maximum": 1})
    ' > 0, ≤ 1'
    """
    bounds = ", ".join(f"{sign} {field[bound]:g}" for bound, sign in _BOUNDS.items() if bound in field)
    return f" {bounds}" if bounds else ""


if __name__ == "__main__":
    for name, text in write_reference().items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
