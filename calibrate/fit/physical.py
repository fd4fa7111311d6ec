"""The physical model's efficiencies, from measured steps and kernels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from scipy.optimize import least_squares, lsq_linear

from servecast.calibrate.fit.kernels import kernel_seconds
from servecast.calibrate.fit.measurements import Engine
from servecast.calibrate.fit.noise import Floats, Scatter
from servecast.calibrate.fit.rows import Kernel, Step
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.noise import StepNoise
from servecast.sim.hardware.step_time.physical import Efficiencies
from servecast.sim.inputs.errors import InputError

TYPICAL = Efficiencies()


@dataclass(frozen=True, slots=True)
class Prior:
    """What is known of a parameter before anything is measured: it is near its typical value (the default of
    ``Efficiencies``) with standard deviation ``spread`` of the logarithm, between ``low`` and ``high``."""

    spread: float
    low: float
    high: float


PRIORS = {
    "compute": Prior(0.5, 0.01, 1.0),
    "bandwidth": Prior(0.3, 0.01, 1.0),
    "attention_compute": Prior(0.7, 0.01, 1.0),
    "kv_bandwidth": Prior(0.5, 0.01, 1.0),
    "overlap_exponent": Prior(1.0, 1.0, 100.0),
    "kernel_s": Prior(1.5, 1e-9, 1e-2),
    "attention_seq_s": Prior(1.5, 1e-11, 1e-2),
    "host_fixed_s": Prior(2.5, 1e-8, 1.0),
    "host_per_seq_s": Prior(2.5, 1e-9, 0.1),
}
PRIORS_OF_RANKS = {"link": Prior(0.7, 0.01, 1.0), "allreduce_s": Prior(1.5, 1e-7, 1e-2)}

STEP_PRECISION = (
    0.03  # relative, of the physical model on a whole step: rows are weighed by it and their noise
)
KERNEL_PRECISION = 0.10  # and on a kernel alone
TOLD = 0.5  # a parameter is fitted if the rows leave less than this share of its prior's spread
DRAWS = 200
_INTERVAL = (5.0, 95.0)  # percentiles of the draws
_CLASS_STEPS = 8  # single steps whose contexts are within a factor of 2^(1/8) are one composition
_TOLERANCE = 1e-5  # of the cost and the parameters, relative, where the search ends
_FEW = 3  # times of a composition, below which it is joined with others like it


class PhysicalFit:
    """Robust least squares of ``PhysicalStepTime`` to the logarithms of measured times.

    Every parameter is held by a weak prior to its typical value, so one that the rows say nothing about stays
    there, and a sum of which only the total is told is shared out plausibly. Bounds keep physics. Several
    engines (models) are fitted together.

    Args:
        gpu: whose peaks the efficiencies are shares of.
        scatter: of the measured times; none by default. start: where the search begins.
        draws: of the bootstrap; 0 leaves ``interval_`` empty.

    Attributes:
        efficiencies_: the fit.
        told_: parameters that the rows determine; all others of ``Efficiencies`` are assumed.
        interval_: parameter -> 90 % interval, for those in ``told_``.
    """

    efficiencies_: Efficiencies
    told_: tuple[str, ...]
    interval_: dict[str, tuple[float, float]]

    def __init__(
        self, gpu: GPU, scatter: Scatter | None = None, *, start: Efficiencies = TYPICAL, draws: int = DRAWS
    ) -> None:
        self.gpu, self.scatter = gpu, scatter or Scatter(StepNoise())
        self.start, self.draws = start, draws

    def fit(self, engines: Sequence[Engine], steps: Sequence[Step], kernels: Sequence[Kernel] = ()) -> Self:
        """Fit to steps of these engines, kernels, or both.

        Raises:
            InputError: fewer rows than parameters.
        """
        priors = dict(PRIORS)
        if any(engine.tensor_parallel_size > 1 for engine in engines):
            priors |= PRIORS_OF_RANKS
        names = list(priors)
        if len(steps) + len(kernels) < len(names):
            raise InputError(
                f"{len(steps) + len(kernels)} different rows for {len(names)} parameters",
                where="measurements",
                fix="Measure more of the grid: give calibrate measure a longer --time-budget, or --resume.",
            )
        # a point is 1 + log(parameter / its lowest value): away from 0, where relative differences end
        lowest = np.array([prior.low for prior in priors.values()])
        typical = np.array([getattr(TYPICAL, name) for name in names])
        centre = 1 + np.log(typical / lowest)
        spread = np.array([prior.spread for prior in priors.values()])
        low, high = np.ones(len(names)), 1 + np.log([prior.high for prior in priors.values()] / lowest)
        log_measured = np.log(np.concatenate([self.scatter.means(steps), [row.median_s for row in kernels]]))
        # kernels, however many, count no more than as many steps
        crowd = max(1.0, len(kernels) / len(steps)) if steps else 1.0
        of_kernel = KERNEL_PRECISION * math.sqrt(crowd)
        precision = np.concatenate(
            [np.hypot(STEP_PRECISION, self.scatter.standard_errors(steps)), np.full(len(kernels), of_kernel)]
        )

        def residuals(point: Floats) -> Floats:
            efficiencies = _efficiencies(names, lowest * np.exp(point - 1))
            seconds = self._steps_seconds(engines, steps, efficiencies)
            seconds += [kernel_seconds(row, self.gpu, efficiencies) for row in kernels]
            return np.concatenate([(np.log(seconds) - log_measured) / precision, (point - centre) / spread])

        found = least_squares(
            residuals,
            1 + np.log([getattr(self.start, name) for name in names] / lowest),
            bounds=(low, high),
            x_scale=spread,
            diff_step=1e-4,
            loss="soft_l1",
            ftol=_TOLERANCE,
            xtol=_TOLERANCE,
        )
        left = np.sqrt(np.diag(np.linalg.inv(found.jac.T @ found.jac))) / spread
        self.told_ = tuple(name for name, share in zip(names, left, strict=True) if share < TOLD)
        moved = np.abs(found.x - centre) > 1e-9
        self.efficiencies_ = _efficiencies(names, np.where(moved, lowest * np.exp(found.x - 1), typical))
        self.interval_ = {}
        if self.draws:
            points = _bootstrap(found.x, found.jac, found.fun, spread, (low, high), self.draws)
            ends = np.percentile(lowest * np.exp(points - 1), _INTERVAL, axis=0).T.tolist()
            self.interval_ = {
                name: (first, last)
                for name, (first, last) in zip(names, ends, strict=True)
                if name in self.told_
            }
        return self

    def predict(self, engines: Sequence[Engine], steps: Sequence[Step]) -> Floats:
        """Seconds of the steps."""
        return np.array(self._steps_seconds(engines, steps, self.efficiencies_))

    def predict_kernels(self, kernels: Sequence[Kernel]) -> Floats:
        """Seconds of the kernels."""
        return np.array([kernel_seconds(row, self.gpu, self.efficiencies_) for row in kernels])

    def _steps_seconds(
        self, engines: Sequence[Engine], steps: Sequence[Step], efficiencies: Efficiencies
    ) -> list[float]:
        models = [engine.step_time(self.gpu, efficiencies) for engine in engines]
        return [models[step.engine].seconds(step) for step in steps]


def _efficiencies(names: Sequence[str], values: Floats) -> Efficiencies:
    return replace(TYPICAL, **dict(zip(names, values.tolist(), strict=True)))


def _bootstrap(
    point: Floats, jac: Floats, fun: Floats, spread: Floats, bounds: tuple[Floats, Floats], count: int
) -> Floats:
    """Fits to resampled rows with resampled priors, each by one Gauss-Newton step from the fit (as the fast
    bootstrap of robust regression: Salibian-Barrera and Zamar 2002). Returns draws x parameters.

    jac: scipy's, scaled for soft_l1; the residuals that belong to it are fun (1 + fun^2)^(1/4).
    """
    rng = np.random.default_rng(0)
    size = len(point)
    rows = len(fun) - size
    scaled = fun * (1 + fun * fun) ** 0.25
    draws = []
    for _ in range(count):
        weight = np.sqrt(np.append(rng.multinomial(rows, np.full(rows, 1 / rows)), np.ones(size)))
        shift = np.append(np.zeros(rows), rng.standard_normal(size) * spread * np.diag(jac[rows:]))
        q, r = np.linalg.qr(weight[:, None] * jac)
        target = -q.T @ (weight * (scaled + shift))
        step = lsq_linear(r, target, bounds=[bound - point for bound in bounds], method="bvls")
        draws.append(point + step.x)
    return np.array(draws)


def joined(steps: Sequence[Step]) -> list[Step]:
    """Compositions that were timed only once or twice (of a long run), joined with those like them: the same
    engine, region, decodes and chunk lengths, and about the same contexts."""
    alike: defaultdict[tuple[object, ...], list[Step]] = defaultdict(list)
    for number, step in enumerate(steps):
        key: tuple[object, ...] = (number,)
        if len(step.times_s) < _FEW:
            contexts = (step.decode_context, *(context for _, context in step.chunks))
            lengths = tuple(tokens for tokens, _ in step.chunks)
            logs = tuple(round(_CLASS_STEPS * math.log2(1 + context)) for context in contexts)
            key = (step.engine, step.region, step.decodes, step.samples, lengths, logs)
        alike[key].append(step)
    return [_joined(group) if len(group) > 1 else group[0] for group in alike.values()]


def _joined(group: Sequence[Step]) -> Step:
    first = group[0]
    chunks = [
        (first.chunks[at][0], round(np.mean([step.chunks[at][1] for step in group])))
        for at in range(len(first.chunks))
    ]
    return first.model_copy(
        update={
            "chunks": tuple(chunks),
            "decode_context": round(np.mean([step.decode_context for step in group])),
            "times_s": tuple(time for step in group for time in step.times_s),
        }
    )
