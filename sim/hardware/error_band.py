"""What a prediction rests on, and how its error band widens with the distance from what was measured.

Efficiencies carry over between models on one GPU, and less surely between GPUs. What that costs is known
where a fit left one of its models out and predicted it from the others; elsewhere the widths below are
assumed, and said to be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from servecast.sim.hardware.gpu import GPU, find_gpu
from servecast.sim.hardware.profile import Profile
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError

TYPICAL_BAND = 0.3  # of a GPU that nobody measured
KERNELS_BAND = 0.25  # of token times from kernel timings: kept by 99 % of 195 runs on H100 and H200
MODEL_BAND = 0.2  # least band of another model, where the fit did not leave one out
GPU_BAND = 0.3  # least band of another GPU
PER_DOUBLING = 0.02  # more for each doubling of the weights of the nearest model, or of the bandwidth
PER_RANK_DOUBLING = 0.05  # more for each doubling of the ranks: all-reduces that nobody measured


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
        error_band: relative; None if not known.
        of_kernels: single kernels were timed.
    """

    basis: str
    model_doublings: float
    rank_doublings: float
    gpu_doublings: float | None
    error_band: float | None
    of_kernels: bool = False

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
            basis, band = f"measured kernels of the {profile.gpu}", KERNELS_BAND
        else:
            basis = f"kernels of the {profile.gpu} scaled to the {shard.gpu.name} by peak and bandwidth"
            band = GPU_BAND + PER_DOUBLING * _size(gpus)
        return Transfer(basis, 0.0, 0.0, gpus, band, of_kernels=True)
    if all(entry.origin == "assumed" for entry in profile.provenance):
        return Transfer("physics only", models, ranks, gpus, max(TYPICAL_BAND, profile.error_band or 0.0))
    if models == 0 and ranks == 0 and gpus is None:
        basis = "fitted to a report" if profile.fitted_rows else "measured here"
        return Transfer(basis, models, ranks, gpus, profile.error_band)
    band = 1.5 * (profile.error_band or 0.0)
    if models != 0:
        band = max(band, _left_out(profile)) + PER_DOUBLING * _size(models)
    if gpus is not None:
        band = max(band, GPU_BAND) + PER_DOUBLING * _size(gpus)
    band += PER_RANK_DOUBLING * abs(ranks)
    return Transfer("scaled from a measured reference", models, ranks, gpus, band)


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
