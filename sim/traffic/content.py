"""Which prompts share their leading tokens: what the prefix cache can find again."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, GetJsonSchemaHandler, Tag, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from servecast.sim.inputs.schema import Count, Model

_IDS_PER_NAME = 1 << 26


class _Content(Model):
    @model_validator(mode="before")
    @classmethod
    def _from_word(cls, data: Any) -> Any:
        return {"kind": data} if isinstance(data, str) else data

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        word = {"enum": list(get_args(cls.model_fields["kind"].annotation))}
        return {"anyOf": [word, handler(core)]}


class Unique(_Content):
    """No two prompts have anything in common behind the system prompt."""

    kind: Literal["unique"] = "unique"


class Same(_Content):
    """Every prompt is a leading part of one text, so that prompts of one length are equal. Streams that
    name the same ``text`` share it."""

    kind: Literal["same"]
    text: str = "text"


class Repeat(_Content):
    """Prompts differ within a stage, and prompt i is the same in every stage: ``vllm bench serve`` with the
    random dataset and one seed, run level after level on a server that keeps its cache. (With a range ratio
    vLLM's prompts repeat only between levels of the same number of requests; here they always do.)"""

    kind: Literal["repeat"]


class SharedPrefix(_Content):
    """``groups`` groups of prompts, each group with its own ``prefix_tokens`` in front, added to the
    stream's ``prompt_tokens``.

    With ``prompts_per_group`` there are only groups x prompts_per_group different prompts, which come again
    whole; without, the part behind the prefix is unique. ``order`` picks independently with equal chances
    ("random"), or goes round one random permutation that starts anew in each stage ("cycle", as
    inference-perf's shared_prefix does).
    """

    kind: Literal["shared_prefix"]
    groups: Count
    prefix_tokens: Count
    prompts_per_group: Count | None = None
    order: Literal["random", "cycle"] = "random"


def _kind(data: Any) -> str | None:
    kind = data.get("kind") if isinstance(data, dict) else getattr(data, "kind", data)
    return kind if isinstance(kind, str) else None


Content = Annotated[
    Annotated[Unique, Tag("unique")]
    | Annotated[Same, Tag("same")]
    | Annotated[Repeat, Tag("repeat")]
    | Annotated[SharedPrefix, Tag("shared_prefix")],
    Discriminator(_kind),
]


class ContentIds:
    """Content ids of one run: each name owns a range of ids, given out in the order of first use."""

    def __init__(self) -> None:
        self._names: dict[object, int] = {}

    def first(self, *name: object) -> int:
        """The first id of the range of a name."""
        return self._names.setdefault(name, len(self._names)) * _IDS_PER_NAME
