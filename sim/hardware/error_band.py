"""What a prediction rests on, and how its error bands widen with the distance from what was measured.

Efficiencies carry over between models on one GPU, and less surely between GPUs. What that costs is known
where a fit left one of its models out and predicted it from the others; elsewhere the widths below are
assumed, and said to be.

Each metric has a band of its own. Those from kernel timings, and that of TTFT on any basis, come from real
runs: ``scenarios/make/error_bands.py`` derives them from the shipped reproductions, group by group, each from
all other groups, and a test holds how many rows of the group that was left out lie inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from servecast.sim.hardware.gpu import GPU, find_gpu
from servecast.sim.hardware.profile import Profile
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError

TYPICAL_BAND = 0.3  # of a GPU that nobody measured
MODEL_BAND = 0.2  # least band of another model, where the fit did not leave one out
GPU_BAND = 0.3  # least band of another GPU
PER_DOUBLING = 0.02  # more for each doubling of the weights of the nearest model, or of the bandwidth
PER_RANK_DOUBLING = 0.05  # more for each doubling of the ranks: all-reduces that nobody measured


@dataclass(frozen=True, slots=True)
class Bands:
    """Relative error bands of means and medians, by metric: nine in ten predictions err by no more, relative
    to what is measured. None where it is not known.

    Attributes:
        tpot: token times. ttft: time to the first token. throughput: tokens or requests a second of a load
            that keeps the server busy, and E2E latencies.
        max_rate: the largest rate that meets objectives. kv_tokens: size of the KV pool.
        guessed: those that no real measurement supports.
    """

    tpot: float | None = None
    ttft: float | None = None
    throughput: float | None = None
    max_rate: float | None = None
    kv_tokens: float | None = None
    guessed: tuple[str, ...] = ()

    def of(self, metric: str) -> float | None:
        """Of a reported column's metric."""
        return {
            "ttft": self.ttft,
            "tpot": self.tpot,
            "itl": self.tpot,
            "e2el": self.throughput,
            "makespan": self.throughput,
            "output_throughput": self.throughput,
            "request_throughput": self.throughput,
        }.get(metric)

    def wider(self, by: float) -> Bands:
        """With ``by`` more for whatever a step's time decides."""
        names = ("tpot", "ttft", "throughput", "max_rate")
        known = {name: getattr(self, name) for name in names}
        return replace(self, **{name: band + by for name, band in known.items() if band is not None})

    def to_text(self) -> str:
        """In one line; "?" behind what is a guess."""
        names = {"tpot": "TPOT", "ttft": "TTFT", "throughput": "throughput"}
        names |= {"max_rate": "largest rate", "kv_tokens": "KV tokens"}
        known = {name: getattr(self, name) for name in names}
        parts = [
            f"{names[name]} +-{band:.0%}{'?' if name in self.guessed else ''}"
            for name, band in known.items()
            if band is not None
        ]
        return ", ".join(parts) or "not known"


_ALL = ("tpot", "ttft", "throughput")
FITTED_TTFT = 0.55  # of a basis that was fitted end to end
FITTED_THROUGHPUT = 0.08
KERNELS = Bands(tpot=0.18, ttft=0.5, throughput=0.2)  # kernel timings, dense, JUDGED GPUs and weights
JUDGED_GPUS, JUDGED_WEIGHTS = (
    ("H100", "H200"),
    ("bf16", "fp8", "fp8_block"),
)  # those that real runs tell the band of
KERNELS_MOE = Bands(tpot=0.3, ttft=0.4, throughput=0.4)  # the same of mixtures of experts
KERNELS_ELSEWHERE = Bands(tpot=0.3, ttft=0.6, throughput=0.35)  # other GPUs, and timings of the nearest one
MOE_ELSEWHERE = Bands(tpot=0.35, ttft=0.7, throughput=0.45)  # of mixtures of experts there
TYPICAL = Bands(tpot=TYPICAL_BAND, ttft=0.6, throughput=0.45)


@dataclass(frozen=True, slots=True)
class Transfer:
    """From a profile's measurements to a deployment.

    Attributes:
        basis: "measured here", "fitted to a report" (of this GPU and model), "scaled from a measured
            reference", "measured kernels of the GPU", "kernels of the GPU scaled to another by peak and
            bandwidth", or "physics only".
        model_doublings: log2 of the weights over those of the nearest measured model; 0 for one of them,
            NaN where the profile does not say what it was.
        rank_doublings: log2 of the tensor-parallel size over the profile's.
        gpu_doublings: log2 of the bandwidth over that of the profile's GPU; NaN where that is not in the
            catalogue, None on the same GPU.
        bands: relative, by metric.
        of_kernels: single kernels were timed.
    """

    basis: str
    model_doublings: float
    rank_doublings: float
    gpu_doublings: float | None
    bands: Bands
    of_kernels: bool = False

    @property
    def error_band(self) -> float | None:
        """That of token times."""
        return self.bands.tpot

    @property
    def distance(self) -> tuple[str, ...]:
        """In words, what differs from what was measured; empty where nothing does."""
        found = []
        if self.basis == "physics only":
            return ("nothing was measured",)
        if self.of_kernels:
            found.append("kernels were timed, no server")
        if self.model_doublings != 0:
            found.append(f"another model{_times(self.model_doublings, 'the weights')}")
        if self.rank_doublings:
            found.append(f"{2**self.rank_doublings:g} times the ranks")
        if self.gpu_doublings is not None:
            found.append(f"another GPU{_times(self.gpu_doublings, 'the bandwidth')}")
        return tuple(found)


def _times(doublings: float, what: str) -> str:
    return "" if math.isnan(doublings) else f", {2**doublings:.2g} times {what}"


def transfer(profile: Profile, shard: Shard) -> Transfer:
    """How far a deployment is from a profile's measurements."""
    models = _model_doublings(profile, shard)
    ranks = math.log2(shard.tensor_parallel_size / profile.tensor_parallel_size)
    gpus = _gpu_doublings(profile, shard.gpu)
    if profile.of_kernel_timings:
        if gpus is None:
            basis, bands = f"measured kernels of the {profile.gpu}", _of_kernels(shard)
        else:
            basis = f"kernels of the {profile.gpu} scaled to the {shard.gpu.name} by peak and bandwidth"
            bands = _of_family(shard, gpus)
        return Transfer(basis, 0.0, 0.0, gpus, bands, of_kernels=True)
    if all(entry.origin == "assumed" for entry in profile.provenance):
        bands = replace(TYPICAL, tpot=max(TYPICAL_BAND, profile.error_band or 0.0))
        return Transfer("physics only", models, ranks, gpus, _with_rate(bands))
    if models == 0 and ranks == 0 and gpus is None:
        basis = "fitted to a report" if profile.fitted_rows else "measured here"
        told: dict[str, Any] = dict(profile.error_bands)
        bands = replace(_fitted(profile.error_band, FITTED_TTFT), **told)
        return Transfer(basis, models, ranks, gpus, _with_rate(bands))
    band = 1.5 * (profile.error_band or 0.0)
    if models != 0:
        band = max(band, _left_out(profile)) + PER_DOUBLING * _size(models)
    if gpus is not None:
        band = max(band, GPU_BAND) + PER_DOUBLING * _size(gpus)
    band += PER_RANK_DOUBLING * abs(ranks)
    ttft = FITTED_TTFT + band - (profile.error_band or 0.0)  # as much wider as that of token times
    guessed = ("ttft", "throughput") if models == 0 or _told(profile) else _ALL
    bands = _with_rate(replace(_fitted(band, ttft), guessed=guessed))
    return Transfer("scaled from a measured reference", models, ranks, gpus, bands)


def _of_kernels(shard: Shard) -> Bands:
    """From timings of this GPU's kernels."""
    if shard.model.moe_layers:
        return _with_rate(
            KERNELS_MOE if shard.gpu.name in JUDGED_GPUS else replace(MOE_ELSEWHERE, guessed=_ALL)
        )
    if shard.gpu.name in JUDGED_GPUS and shard.linear_kernel in JUDGED_WEIGHTS:
        return _with_rate(KERNELS)
    return _with_rate(replace(KERNELS_ELSEWHERE, guessed=_ALL))


def _of_family(shard: Shard, gpu_doublings: float) -> Bands:
    """From timings of another GPU's kernels: a guess, wider by how much the bandwidths differ."""
    bands = MOE_ELSEWHERE if shard.model.moe_layers else KERNELS_ELSEWHERE
    return _with_rate(replace(bands, guessed=_ALL).wider(PER_DOUBLING * _size(gpu_doublings)))


def _fitted(tpot: float | None, ttft: float) -> Bands:
    throughput = None if tpot is None else max(tpot, FITTED_THROUGHPUT)
    return Bands(tpot=tpot, ttft=ttft, throughput=throughput)


def _with_rate(bands: Bands) -> Bands:
    """With the band of what follows: the largest rate of an objective moves more than the throughput of a
    busy server, by how much is a guess."""
    rate = None if bands.throughput is None else 1.5 * bands.throughput
    return replace(bands, max_rate=rate, guessed=(*bands.guessed, "max_rate"))


def _told(profile: Profile) -> bool:
    """Whether its fit left models out and predicted them."""
    return bool(profile.fit and profile.fit.transfer)


def _size(doublings: float) -> float:
    return 0.0 if math.isnan(doublings) else abs(doublings)


def _left_out(profile: Profile) -> float:
    """The error of models predicted by a fit to the others: that which 90 % of the worst one's steps keep."""
    errors = [each.held_out_p90 for each in (profile.fit.transfer if profile.fit else ())]
    return max((error for error in errors if error is not None), default=MODEL_BAND)


def _model_doublings(profile: Profile, shard: Shard) -> float:
    if shard.model.name in (profile.model, *(shape.name for shape in profile.models)):
        return 0.0
    whole = shard.whole
    ratios = [
        math.log2(whole.weight_bytes / replace(whole, model=shape).weight_bytes) for shape in profile.models
    ]
    nearest = min(ratios, key=abs, default=math.nan)
    return nearest if nearest != 0 else math.nan  # as large, but another one


def _gpu_doublings(profile: Profile, gpu: GPU) -> float | None:
    if gpu.name == profile.gpu:
        return None
    try:
        measured = find_gpu(profile.gpu)
    except InputError:
        return math.nan
    return math.log2(gpu.bandwidth / measured.bandwidth)
