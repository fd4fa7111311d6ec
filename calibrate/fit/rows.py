"""The rows of a folder of measurements, checked: times of kernels, of engine steps, of overheads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]
Dtype = Literal["bf16", "fp16", "fp8", "fp32"]
Times = Annotated[
    tuple[Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)], ...], Field(min_length=1)
]


class _Row(BaseModel):
    """One line. What the fit has no use for (``at``, versions of libraries, ...) is left out."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    case: str
    times_s: Times

    @property
    def median_s(self) -> float:
        return float(np.median(self.times_s))


class Gemm(_Row):
    row: Literal["gemm"]
    dtype: Dtype
    m: Count
    n: Count
    k: Count


class Copy(_Row):
    row: Literal["copy", "host_to_device"]
    bytes: Count

    @property
    def moved_bytes(self) -> int:
        """Through device memory: a copy inside of it reads and writes."""
        return 2 * self.bytes if self.row == "copy" else self.bytes


class PrefillAttention(_Row):
    row: Literal["attention_prefill"]
    chunk: Count
    context: Amount
    q_heads: Count
    kv_heads: Count
    head_dim: Count
    dtype: Dtype = "bf16"


class DecodeAttention(_Row):
    row: Literal["attention_decode"]
    batch: Count
    context: Count
    q_heads: Count
    kv_heads: Count
    head_dim: Count
    dtype: Dtype = "bf16"


class Elementwise(_Row):
    row: Literal["elementwise"]
    bytes: Count


class Sampler(_Row):
    row: Literal["sampler"]
    rows: Count
    vocab: Count


class Launch(_Row):
    row: Literal["launch"]
    mode: Literal["eager", "graph"]
    kernels: Count


Kernel = Gemm | Copy | PrefillAttention | DecodeAttention | Elementwise | Sampler | Launch


class Step(_Row):
    """An engine step (a ``sim.step_time.StepShape``) and how long it took. ``engine`` is the place of its
    engine in ``Measurements.engines``."""

    row: Literal["step"]
    model: str
    region: str
    chunks: tuple[tuple[Count, Amount], ...] = ()
    decodes: Amount
    decode_context: Amount
    samples: Amount
    engine: int = -1
    # what a measured step has none of: pydantic is slow to say that an attribute is missing
    drafts: ClassVar[int] = 0
    adapters: ClassVar[None] = None
    decode_windowed: ClassVar[None] = None

    @model_validator(mode="after")
    def _computes_something(self) -> Step:
        if not self.chunks and not self.decodes:
            raise ValueError("neither chunks nor decodes: the step computes nothing")
        return self

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return self.decodes + sum(tokens for tokens, _ in self.chunks)

    @property
    def batch(self) -> int:
        """Requests in the step."""
        return self.decodes + len(self.chunks)

    @property
    def context(self) -> float:
        """KV tokens of a request when the step ends, the mean over its requests."""
        return (self.decode_context + sum(map(sum, self.chunks))) / self.batch


class Overhead(_Row):
    """``request_in``: client sends to engine's queue. ``token_out``: engine has a token to client read it.

    ``burst``: requests on their way in at a time, or tokens that left the engine in that step, ``firsts`` of
    them a request's first. ``first``: these, or later ones. ``turn``: one of several at that concurrency.
    ``lumped``: share of its streams whose tokens came together. ``more_tokens``: of its prompts, beyond
    those of the other rows.
    """

    row: Literal["overhead"]
    kind: Literal["request_in", "token_out"]
    concurrency: Count
    burst: Count | None = None
    firsts: Amount = 0
    first: bool = False
    turn: Amount = 0
    lumped: float = 0.0
    more_tokens: Amount = 0


_KERNEL: TypeAdapter[Kernel] = TypeAdapter(Annotated[Kernel, Field(discriminator="row")])
KERNEL_ROWS = {kind for of in get_args(Kernel) for kind in get_args(of.model_fields["row"].annotation)}
ENGINE_ROWS = {"engine", "step", "overhead"}


def kernel(row: Mapping[str, Any]) -> Kernel:
    """A line of kernels.jsonl; pydantic's ValidationError if it is wrong."""
    return _KERNEL.validate_python(row)
