"""Strict models for what users write, and how their mistakes are told: one clear InputError each."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ModelSchema

from servecast.sim.inputs.errors import InputError


class _Described(GenerateJsonSchema):
    """With what stands under a field as its description, which takes long to find."""

    def model_schema(self, schema: ModelSchema) -> dict[str, Any]:
        found, model = super().model_schema(schema), schema["cls"]
        for each in reversed(model.__mro__):
            if issubclass(each, Model) and each is not Model:
                tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(each)))
                for pair in pairwise(cast(ast.ClassDef, tree.body[0]).body):
                    match pair:
                        case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                            alias = model.model_fields[name].alias or name
                            found["properties"][alias]["description"] = inspect.cleandoc(text)
        return found


class Model(BaseModel):
    """A frozen model without unknown fields. What a field means stands under it, and from there in the JSON
    schema and the scenario reference."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        defer_build=True,  # of those that a command asks for
        serialize_by_alias=True,
    )

    @classmethod
    def model_json_schema(cls, *args: Any, **options: Any) -> dict[str, Any]:
        return super().model_json_schema(*args, **{"schema_generator": _Described, **options})

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if isinstance(data, Mapping):
            known = [field.alias or name for name, field in cls.model_fields.items()]
            for key in data:
                if key not in known:
                    fix = did_you_mean(str(key), known) or f"Known are {', '.join(known)}."
                    raise invalid(f"unknown field {key!r}", fix, at=str(key))
        return data


def _resolve(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder")
    path = path if folder is None else Path(folder) / path
    if not path.is_file():
        raise invalid(f"there is no file {str(path)!r}", "Paths are relative to the scenario's folder.")
    return path


Count = Annotated[int, Field(strict=True, ge=1)]
Amount = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Flag = Annotated[bool, Field(strict=True)]
InputFile = Annotated[Path, AfterValidator(_resolve)]

M = TypeVar("M", bound=BaseModel)


def invalid(what: str, fix: str, *, at: str | None = None) -> PydanticCustomError:
    """The error that validators raise: what is wrong, what to do, and the field (relative) it is about."""
    return PydanticCustomError("servecast", "{what}", {"what": what, "fix": fix, "at": at})


@contextmanager
def within(path: str) -> Iterator[None]:
    """Puts ``path`` in front of the fields that errors of ``invalid`` are about."""
    try:
        yield
    except PydanticCustomError as error:
        context = dict(error.context or {})
        at = ".".join(part for part in (path, context.get("at")) if part)
        raise invalid(context["what"], context["fix"], at=at) from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "Did you mean x?", or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else ""


def parse(model: type[M], data: Any, *, source: str, folder: Path | None = None) -> M:
    """Validate ``data``; paths in it are relative to ``folder``.

    Raises:
        InputError: about the first mistake, with ``source`` and the field's path.
    """
    try:
        return model.model_validate(data, context={"folder": folder})
    except ValidationError as error:
        details = error.errors(include_url=False)
        what, fix, path = _explain(details[0], data)
        more = len({_place(each["loc"], data) for each in details}) - 1  # a union has one for each form
        if more > 0:
            fix += f" ({more} more after this one.)"
        raise InputError(what, where=f"{source}: {path}" if path else source, fix=fix) from None


_EXPECTED = {  # pydantic's error types, in words that need no Python
    "too_short": "a list that is not empty",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
}


def _explain(error: ErrorDetails, data: Any) -> tuple[str, str, str]:
    """what, fix and field path of a pydantic error."""
    kind, value, context = error["type"], error["input"], error.get("ctx") or {}
    path, field = _place(error["loc"], data)
    if kind == "servecast":
        return context["what"], context["fix"], ".".join(p for p in (path, context["at"]) if p)
    if kind == "missing":
        return f"field {field!r} is missing", "Add it.", f"{path}.{field}" if path else field
    if kind in ("literal_error", "union_tag_invalid"):
        text = context["expected_tags" if kind == "union_tag_invalid" else "expected"]
        expected = re.findall(r"'([^']*)'", text) or [text]
        word = context.get("tag", value)
        what = (
            f"{word!r} is not a known kind" if kind == "union_tag_invalid" else f"{field} cannot be {word!r}"
        )
        return what, f"{did_you_mean(str(word), expected)} Known: {', '.join(expected)}.".strip(), path
    if kind == "union_tag_not_found":
        return f"cannot tell what {_short(value)} is", "Give its 'kind'.", path
    if isinstance(value, str) and (fix := _unit_fix(field, value)):
        return f"{field} is a number without a unit, not {value!r}", fix, path
    expected_text = _EXPECTED.get(kind) or error["msg"].removeprefix("Input should be ")
    return f"{field} should be {expected_text}, not {_short(value)}", "Correct it.", path


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _place(loc: tuple[int | str, ...], data: Any) -> tuple[str, str]:
    """The path as the user wrote it (pydantic's location without the tags of its unions), and the field's
    name: the last of the path, or the field inside it that the user did not write."""
    parts: list[str] = []
    inside = ""
    for part in loc:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            inside = str(part)
            continue
        parts.append(str(part))
        inside = ""
    named = [part for part in parts if not part.isdigit()]
    unwritten = inside if isinstance(data, Mapping) or not named else ""
    return ".".join(parts), unwritten or (named[-1] if named else "this")


_FACTORS: dict[str, dict[str, float]] = {
    "s": {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0},
    "bytes": {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30},
    "rate": {
        "/s": 1.0,
        "rps": 1.0,
        "qps": 1.0,
        "req/s": 1.0,
        "/min": 1 / 60,
        "rpm": 1 / 60,
        "req/min": 1 / 60,
    },
    "tokens": {"tokens": 1, "token": 1, "tok": 1, "k": 1000},
}
_UNIT_NAMES = {"s": "seconds", "bytes": "bytes", "rate": "requests a second", "tokens": "tokens"}


def _unit_fix(field: str, value: str) -> str | None:
    """What to write instead of a number with a unit ("10ms"), or None when it is not one."""
    match = re.fullmatch(r"\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*([A-Za-z/%]*)\s*", value)
    if match is None:
        return None
    number, unit = float(match[1]), match[2].lower()
    kind = "tokens" if field == "tokens" else field.rsplit("_", 1)[-1]
    if not unit:
        return f"Write {field}: {_plain(number)}"
    if kind not in _UNIT_NAMES:
        return "Write the number alone."
    factor = _FACTORS[kind].get(unit)
    if factor is None:
        return f"It is in {_UNIT_NAMES[kind]}."
    return f"It is in {_UNIT_NAMES[kind]}: write {field}: {_plain(number * factor)}"


def _plain(number: float) -> str:
    """As YAML 1.1 reads a number: without an exponent."""
    return f"{number:.9f}".rstrip("0").rstrip(".")
