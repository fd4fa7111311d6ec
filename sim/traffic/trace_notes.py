"""What a reader should know of the traces in a workload, in words."""

from __future__ import annotations

from servecast.sim.traffic.spec import StreamSpec, Workload
from servecast.sim.traffic.trace_spec import TraceSpec
from servecast.sim.traffic.traces import Trace


def trace_notes(workload: Workload) -> list[str]:
    """What of the traces' files is not in the traffic, and what was done with them: stretched, repeated.

    Raises:
        InputError: a trace cannot be read.
    """
    notes: dict[str, None] = {}
    for stage in workload.stages:
        for stream in stage.streams:
            if stream.trace is not None:
                notes |= dict.fromkeys(_notes(stream, stream.trace, stream.trace.read()))
    return list(notes)


def _notes(stream: StreamSpec, spec: TraceSpec, trace: Trace) -> list[str]:
    name, notes = spec.path.name, list(trace.notes)
    if spec.request_rate is not None and stream.own_arrivals:
        notes.append(
            f"{name}: its own arrivals, stretched to {spec.request_rate:.4g} requests/s; other ones take an "
            "arrival law in the workload or the plan block"
        )
    if spec.repeat and stream.num_requests is not None and stream.num_requests > len(trace):
        notes.append(
            f"{name}: {len(trace)} requests, repeated to {stream.num_requests}; each round has prompts of "
            "its own, which share as those of the trace do"
        )
    return notes
