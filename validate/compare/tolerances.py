"""How far a prediction may lie from its measurement: tolerances.yaml, or a file of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from pydantic import model_validator

from servecast.sim.inputs.schema import Count, Model, NonNegative, Positive, did_you_mean, invalid, parse
from servecast.sim.inputs.yaml_file import read_yaml
from servecast.validate.compare.samples import LATENCIES, STATISTICS

COUNTS = (
    "request_throughput",
    "output_throughput",
    "kv_cache_usage_peak",
    "max_num_running",
    "max_num_waiting",
    "num_preemptions",
    "prefix_cache_hit_rate",
    "spec_decode_acceptance_length",
)
OF_SWEEPS = ("knee", "max_request_rate")
FIGURES = (  # that can be judged
    *COUNTS,
    *(f"{name}_{metric}_ms" for metric in LATENCIES for name in STATISTICS),
    "mean_queue_time_ms",
    *OF_SWEEPS,
)


class Tolerance(Model):
    """How far a prediction may lie from its measurement: the wider of the two."""

    relative: NonNegative = 0.0
    absolute: NonNegative = 0.0

    @model_validator(mode="after")
    def _some(self) -> Tolerance:
        if not self.relative and not self.absolute:
            raise invalid("the tolerance is nothing", "Give relative, absolute or both.")
        return self

    def allowed(self, measured: float) -> float:
        """The largest difference, in the measured value's unit."""
        return max(self.relative * abs(measured), self.absolute)


class Tolerances(Model):
    """See the shipped tolerances.yaml, which also says what each limit means."""

    rows: Mapping[str, Tolerance]
    client_lag_ms: Positive = 20.0
    min_requests: Count = 20
    max_failed_share: NonNegative = 0.01
    max_length_difference: NonNegative = 0.05

    @model_validator(mode="after")
    def _known(self) -> Tolerances:
        for name in self.rows:
            if name not in FIGURES:
                fix = did_you_mean(name, FIGURES) or f"Known are {', '.join(FIGURES)}."
                raise invalid(f"there is no figure {name!r} to judge", fix)
        return self

    @classmethod
    def load(cls, path: Path | None = None) -> Tolerances:
        """From a YAML file; the shipped ones without.

        Raises:
            InputError: it cannot be read, or something in it is not a tolerance.
        """
        path = path or Path(str(resources.files("servecast.validate.compare").joinpath("tolerances.yaml")))
        return parse(cls, read_yaml(path), source=str(path))
