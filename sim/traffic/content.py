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
    """Every prompt is a leading part of one text, so that prompts of one length are equal."""

    kind: Literal["same"]
    text: str = "text"
    """Name of the text. Streams that name the same one share it."""


class Repeat(_Content):
    """Prompts differ within a stage, and prompt i is the same in every stage: ``vllm bench serve`` with the
    random dataset and one seed, run level after level on a server that keeps its cache. (With a range ratio
    vLLM's prompts repeat only between levels of the same number of requests; here they always do.)"""

    kind: Literal["repeat"]


class SharedPrefix(_Content):
    """Groups of prompts, each with a prefix of its own."""

    kind: Literal["shared_prefix"]
    groups: Count
    """Number of prefixes."""
    prefix_tokens: Count
    """Length of each prefix, in front of ``prompt_tokens``."""
    prompts_per_group: Count | None = None
    """Different prompts of a group, which come again whole. Default, each prompt is unique behind its
    prefix."""
    order: Literal["random", "cycle"] = "random"
    """Which group comes next: each with equal chances, or round one random permutation that starts anew in
    each stage (``cycle``, as inference-perf's ``shared_prefix`` does)."""


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

    def of_adapter(self, content_id: int, adapter: int) -> int:
        """The id of the same tokens as a LoRA adapter sees them."""
        owner, place = divmod(content_id, _IDS_PER_NAME)
        return self.first("adapter", adapter, owner) + place
