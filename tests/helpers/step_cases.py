"""Steps to ask step times of."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st
from model_shapes import PUBLISHED, load

from servecast.sim.hardware.gpu import CATALOGUE
from servecast.sim.hardware.step_time.physical import (
    Efficiencies,
)

SHAPES = {name: load(name) for name in PUBLISHED}
DEPLOYMENTS = [  # (model, GPU) that vLLM runs
    (name, gpu)
    for name, shape in sorted(SHAPES.items())
    for gpu in CATALOGUE
    if gpu.capability[0] * 10 + gpu.capability[1] >= shape.least_capability
]


@dataclass(frozen=True)
class Step:
    chunks: tuple[tuple[int, int], ...] = ()
    decodes: int = 0
    decode_context: int = 0
    samples: int = 0


def decode(batch: int, context: int = 500) -> Step:
    return Step(decodes=batch, decode_context=batch * context, samples=batch)


shares = st.floats(0.05, 1.0) | st.just(1.0)


efficiencies = st.builds(
    Efficiencies,
    compute=shares,
    bandwidth=shares,
    attention_compute=shares,
    kv_bandwidth=shares,
    link=shares,
    overlap_exponent=st.floats(1.0, 50.0),
    kernel_s=st.floats(0, 1e-5),
    attention_seq_s=st.floats(0, 1e-6),
    host_fixed_s=st.floats(0, 1e-2),
    host_per_seq_s=st.floats(0, 1e-4),
    allreduce_s=st.floats(0, 1e-4),
)


chunks = st.lists(st.tuples(st.integers(1, 8192), st.integers(0, 100_000)), max_size=4).map(tuple)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    parts, decodes = draw(chunks), draw(st.integers(0, 1024))
    context = decodes * draw(st.integers(1, 50_000)) + (draw(st.integers(0, 1000)) if decodes else 0)
    return Step(parts, decodes, context, decodes + draw(st.integers(0, len(parts))))
