"""The forms in which a scenario writes its workload, and the stages that each comes to."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from servecast.sim.inputs.schema import invalid, within
from servecast.sim.traffic.inference_perf.workload import InferencePerfWorkload
from servecast.sim.traffic.spec import StageSpec, StreamSpec, Sweep, Workload


def _form(data: object) -> str:
    for key, model, form in (
        ("stages", Workload, "several stages"),
        ("inference_perf", InferencePerfWorkload, "inference-perf file"),
    ):
        if (isinstance(data, dict) and key in data) or isinstance(data, model):
            return form
    return "one stream"


WorkloadSpec = Annotated[
    Annotated[StreamSpec, Tag("one stream")]
    | Annotated[Workload, Tag("several stages")]
    | Annotated[InferencePerfWorkload, Tag("inference-perf file")],
    Discriminator(_form),
]


def expand(spec: StreamSpec | Workload | InferencePerfWorkload, sweep: Sweep | None) -> Workload:
    """The stages of a workload as written: a stream, a stream with a sweep over it, or stages.

    Raises:
        PydanticCustomError: the parts do not fit together.
    """
    if not isinstance(spec, StreamSpec):
        if sweep is not None:
            raise invalid("a sweep over several stages", "Give one stream, or the stages alone.", at="sweep")
        return spec if isinstance(spec, Workload) else spec.workload()
    if sweep is not None:
        return sweep.of(spec)
    with within("workload"):
        spec.check_complete()
    return Workload(stages=(StageSpec(streams=(spec,)),))
