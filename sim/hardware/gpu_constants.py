"""What a GPU reaches of its datasheet, kernel by kernel, and which file says so.

A file of ``scenarios/gpus`` holds about twenty constants of one GPU, fitted to timings of vLLM's own kernels
on it (``scenarios.make.kernels``). They are facts of a GPU and a precision, not of a model:
``efficiencies`` picks those that a model's precisions and its number of ranks ask for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from servecast.sim.hardware.expert_ranks import BACKENDS
from servecast.sim.hardware.gpu import GPU, find_gpu
from servecast.sim.hardware.layer_kinds import STATES
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.mixers import MixerCosts
from servecast.sim.hardware.step_time.physical import Efficiencies, KernelCosts
from servecast.sim.inputs.errors import InputError

Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0, lt=1)]
Passes = Annotated[float, Field(ge=0, lt=100)]

WeightDtype = Literal["bf16", "fp8", "fp8_block", "int8", "int4", "nvfp4", "mxfp4", "mxfp4_mxfp8"]
KvDtype = Literal["bf16", "fp8"]
StateKind = Literal["gdn", "kda"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Residuals(_Strict):
    """How a fit did: measured rows, and of |fitted / measured - 1| the median and what 90 % keep.

    by_region: the median of fitted / measured - 1 in ranges of what the kernel grows with (tokens of a
    product, tokens of a prompt, bytes of KV or of an all-reduce), as "lowest-highest".
    """

    rows: int
    median: float
    p90: float
    by_region: dict[str, float]


class Product(_Strict):
    """A matrix product m x k by k x n of 16-bit activations and weights of one dtype.

    Seconds: floor + (compute^p + memory^p)^(1/p) + activations, where compute is 2mnk over the dtype's peak
    times ``compute``, memory the weights over the bandwidth times ``bandwidth``, and activations the bytes of
    input and output over the bandwidth, times ``activation_passes``: how often they are moved, a quantisation
    of the input included.
    """

    compute: Share
    bandwidth: Share
    overlap_exponent: Annotated[float, Field(ge=1, lt=100)]
    floor_s: Seconds
    activation_passes: Passes
    residuals: Residuals | None = None


class PromptAttention(_Strict):
    """Attention of whole prompts in one layer: floor + FLOPs of 128-row tiles over the 16-bit peak times
    ``compute`` + bytes of q, k, v and o over the bandwidth, times ``activation_passes``. With the KV
    write."""

    compute: Share
    activation_passes: Passes
    floor_s: Seconds
    residuals: Residuals | None = None


class DecodeAttention(_Strict):
    """Attention of one token a request in one layer: floor + KV bytes over the bandwidth times ``bandwidth``
    + ``sequence_s`` a request. With the KV write. Where latents are read, their FLOPs over the peak times
    ``compute`` instead, if that is longer. Of a recurrent state the bytes are read and written."""

    compute: Share = 1.0
    bandwidth: Share
    sequence_s: Seconds
    floor_s: Seconds
    residuals: Residuals | None = None


class Indexer(_Strict):
    """What chooses the tokens of sparse attention in one layer: FLOPs over the fp8 peak times ``compute`` in
    prompts, bytes of keys and scores over the bandwidth times ``bandwidth`` in decodes."""

    compute: Share
    bandwidth: Share


class StatePrompts(_Strict):
    """A layer with a recurrent state, over prompts: floor + bytes of q, k, v and o over the bandwidth, times
    ``activation_passes`` + ``serial_s`` for each token of the longest prompt, whose blocks wait for each
    other + ``sequence_s`` a prompt."""

    floor_s: Seconds
    activation_passes: Passes
    serial_s: Seconds
    sequence_s: Seconds
    residuals: Residuals | None = None


class Experts(_Strict):
    """The routed experts of one layer.

    Seconds: floor + FLOPs over the peak times ``compute`` + bytes of the experts that are touched over the
    bandwidth times ``bandwidth`` + bytes of the activations of every expert that a token is sent to over the
    bandwidth, times ``activation_passes``. Reading and multiplying do not overlap. ``expert_s``: what the
    floor grows by for each expert on the rank.
    """

    compute: Share
    bandwidth: Share
    floor_s: Seconds
    expert_s: Seconds = 0.0
    activation_passes: Passes
    residuals: Residuals | None = None


class AllReduce(_Strict):
    """An all-reduce between so many ranks: latency + ring bytes over the link's bandwidth times ``link``; and
    ``by_size`` the seconds that were timed, by bytes, since vLLM changes the algorithm with the size."""

    latency_s: Seconds
    link: Share
    by_size: dict[int, Seconds] = {}
    residuals: Residuals | None = None


class Exchange(_Strict):
    """Tokens on their way to the experts of other ranks and back, in one layer: floor + bytes that a rank
    sends, in 16 bits there and back, over the link's bandwidth times ``link``. Timed on eight ranks."""

    floor_s: Seconds
    link: Share
    residuals: Residuals | None = None


MOST = (
    0.95  # of the 16-bit peak, where power does not hold it back: an RTX 4090 reaches 0.96 (shipped profile)
)
BY_POWER = 2 / 3  # exponent of the watts a FLOP/s: an H100 NVL reached 0.60 of its peak, an H100 of 0.84


@dataclass(frozen=True, slots=True)
class Family:
    """Whose kernels stand for a GPU that was not timed.

    Attributes:
        capability: of the timed GPUs. efficiency: FLOPs a joule, relative to theirs. most: of the 16-bit
            peak.
    """

    capability: tuple[int, int]
    efficiency: float = 1.0
    most: float = MOST


FAMILIES: Mapping[tuple[int, int], Family] = {  # compute capability -> the nearest that was timed
    # GDDR6 and a board's power, as an L40S; 0.41 is what a report of an A6000 fits to (0.57 of its peak)
    (7, 5): Family((8, 9), efficiency=0.41),
    (8, 6): Family((8, 9), efficiency=0.41),
    (8, 7): Family((8, 9), efficiency=0.41),
    # MI300X: products reach 0.45 of the peak in every dtype, copies 0.81 of the bandwidth
    # (https://aiweekly.co/alerts/amd-mi300x-hits-only-45-of-peak-flops-in-practice)
    (9, 4): Family((9, 0), most=0.45),
}
TYPICAL_LINK = AllReduce(latency_s=10e-6, link=0.8)  # NVLink between ranks that were not timed
# PCIe without peer-to-peer, through the host's memory: bytes/s and s, as two RTX PRO 6000 in a server behaved
NO_PEERS, NO_PEERS_S = 16e9, 20e-6
MOST_OF_PCIE = 0.6  # two L40S and two RTX PRO 6000, peer to peer


# weights that were not timed -> those that are multiplied alike: Marlin's, of four and of eight bits, in 16
STAND_INS: Mapping[str, tuple[WeightDtype, ...]] = {
    "fp8": ("fp8_block",),
    "fp8_block": ("fp8",),
    "int4": ("mxfp4", "bf16"),
    "mxfp4": ("int4", "bf16"),
    "mxfp4_mxfp8": ("mxfp4", "int4"),
    "int8": ("bf16",),
}
# DeepGEMM's grouped products on Hopper: shares of the fp8 peak and of the bandwidth, and how both overlap,
# fitted with shard.DEEP_GEMM_COLUMNS to the ten grouped shapes of its own table of an H800 (README of
# deepseek-ai/DeepGEMM at a6d97a1), each met within 9 %
DEEP_GEMM: Mapping[str, Any] = {
    "expert_compute": 0.717,
    "expert_bandwidth": 0.9,
    "expert_overlap": 1.52,
    "expert_passes": 1.0,
}
_STATES: Mapping[str, StateKind] = {"gdn": "gdn", "kda": "kda", "mamba2": "gdn"}  # whose timings stand for it
# latent attention where it was not timed: kernels in the place of one, as the floors on Hopper compare; an
# indexer and a state as the H200's
UNTIMED_LATENT_FLOORS, UNTIMED_SPARSE_FLOORS = 5.0, 10.0
UNTIMED_INDEXER = Indexer(compute=0.40, bandwidth=0.75)
UNTIMED_STATE = MixerCosts(
    prompt_compute=1.0, bandwidth=1.0, passes=4.5, floor_s=5.5e-6, serial_s=4e-8, prompt_s=4e-7
)


_Computing = TypeVar("_Computing", Product, PromptAttention, Experts)
Fitted = Product | PromptAttention | DecodeAttention | Experts | StatePrompts | AllReduce | Exchange


class GpuConstants(_Strict):
    """The constants of one GPU.

    Attributes:
        gpu: its name in the catalogue. source: of the timings. release: the vLLM whose kernels they time.
        small_kernel_s: one of the small kernels of a layer (norm, rotary, activation).
        products, experts: by the weights' dtype. cutlass_experts: whole ones on each rank, by FlashInfer's
            CUTLASS. marlin_experts: of four bits, in any format. prompts, decodes: by the KV cache's dtype,
            as latent and sparse attention and the indexer of the latter. states: by kind. all_reduce: by
            ranks, as all_gather and reduce_scatter, by the bytes of all ranks. exchanges: by
            ``--all2all-backend``.
        compute_factor: by which shares of the peak FLOP/s were scaled for another GPU; not in files.
    """

    schema_version: Literal[1] = 1
    gpu: str
    source: str
    release: str
    small_kernel_s: Seconds
    products: dict[WeightDtype, Product]
    prompts: dict[KvDtype, PromptAttention]
    decodes: dict[KvDtype, DecodeAttention]
    experts: dict[WeightDtype, Experts] = {}
    cutlass_experts: dict[WeightDtype, Experts] = {}
    marlin_experts: dict[WeightDtype, Experts] = {}
    latent_prompts: dict[KvDtype, PromptAttention] = {}
    latent_decodes: dict[KvDtype, DecodeAttention] = {}
    sparse_prompts: dict[KvDtype, PromptAttention] = {}
    sparse_decodes: dict[KvDtype, DecodeAttention] = {}
    indexers: dict[KvDtype, Indexer] = {}
    state_prompts: dict[StateKind, StatePrompts] = {}
    state_decodes: dict[StateKind, DecodeAttention] = {}
    all_reduce: dict[int, AllReduce] = {}
    all_gather: dict[int, AllReduce] = {}
    reduce_scatter: dict[int, AllReduce] = {}
    exchanges: dict[Literal["deepep_high_throughput", "deepep_low_latency"], Exchange] = {}
    compute_factor: float = Field(default=1.0, exclude=True)

    @model_validator(mode="after")
    def _complete(self) -> GpuConstants:
        for name in ("prompts", "decodes"):
            if "bf16" not in getattr(self, name):
                raise ValueError(f"{name} of a bf16 KV cache are missing")
        return self

    @staticmethod
    def are_in(path: Path) -> bool:
        """Whether a file holds a GPU's constants and not a profile."""
        return path.is_file() and '"small_kernel_s"' in path.read_text("utf-8", "replace")

    @classmethod
    def load(cls, path: str | Path) -> GpuConstants:
        """Read a file.

        Raises:
            InputError: it cannot be read, or something in it is no such constant.
        """
        try:
            return cls.model_validate(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            what = str(error)
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                what = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
            raise InputError(
                f"is no file of a GPU's constants ({what})",
                where=str(path),
                fix="Write one with servecast calibrate fit --kernel-tables.",
            ) from error

    def kinds(self) -> tuple[tuple[str, Mapping[Any, Fitted]], ...]:
        """Each kind of kernel with its constants by dtype, or by ranks."""
        return (
            ("products", self.products),
            ("prompts", self.prompts),
            ("decodes", self.decodes),
            ("experts", self.experts),
            ("experts by CUTLASS", self.cutlass_experts),
            ("experts by Marlin", self.marlin_experts),
            ("latent prompts", self.latent_prompts),
            ("latent decodes", self.latent_decodes),
            ("sparse prompts", self.sparse_prompts),
            ("sparse decodes", self.sparse_decodes),
            ("state prompts", self.state_prompts),
            ("state decodes", self.state_decodes),
            ("all-reduce", self.all_reduce),
            ("all-gather", self.all_gather),
            ("reduce-scatter", self.reduce_scatter),
            ("exchanges", self.exchanges),
        )

    def scaled(self, factor: float) -> GpuConstants:
        """With shares of the peak FLOP/s that are so many times as high, up to 1."""
        if factor == 1.0:
            return self

        def of(known: Mapping[Any, _Computing]) -> dict[Any, _Computing]:
            return {
                key: each.model_copy(update={"compute": min(1.0, each.compute * factor), "residuals": None})
                for key, each in known.items()
            }

        names = (
            *("products", "prompts", "latent_prompts", "sparse_prompts"),
            *("experts", "cutlass_experts", "marlin_experts"),
        )
        kinds = {name: of(getattr(self, name)) for name in names}
        return self.model_copy(update=kinds | {"compute_factor": factor})

    def efficiencies(self, shard: Shard) -> Efficiencies:
        """What a model reaches on this GPU, with its precisions and ranks.

        Raises:
            InputError: there are no timings of its weights.
        """
        eight_bits = shard.kv_dtype_bytes == 1 and "fp8" in self.decodes  # read as 16 where it was not timed
        kv: KvDtype = "fp8" if eight_bits else "bf16"
        product = _of(self.products, shard.linear_kernel, self.gpu, "weights")
        prompts, decodes = self.prompts[kv], self.decodes[kv]
        link, _ = self._all_reduce(shard)
        costs = KernelCosts(
            product_s=product.floor_s,
            product_passes=product.activation_passes,
            attention_s=decodes.floor_s,
            attention_passes=prompts.activation_passes,
            all_reduce=self._by_size(link, shard.gpu),
            mixers={
                each.kind: self._mixer(each.kind, kv) for each in shard.model.layer_kinds if not each.attends
            },
        )
        if shard.model.moe_layers:
            by = {"cutlass": self.cutlass_experts, "marlin": self.marlin_experts}.get(shard.routed_by, {})
            known = by if shard.expert_kernel in by else self.experts
            routed = _of(known, shard.expert_kernel, self.gpu, "experts")
            costs = replace(
                costs,
                expert_compute=routed.compute,
                expert_bandwidth=routed.bandwidth,
                expert_s=routed.floor_s + routed.expert_s * shard.expert_ranks.held(shard.model.experts),
                expert_passes=routed.activation_passes,
            )
            if shard.routed_by == "deep_gemm":
                costs = replace(costs, **DEEP_GEMM)
            costs = self._with_exchange(costs, shard)
        if shard.context_ranks > 1:
            gather, scatter = self._collectives(shard.context_ranks, shard.gpu)
            costs = replace(costs, context_gather=gather, context_scatter=scatter)
        return Efficiencies(
            compute=product.compute,
            bandwidth=product.bandwidth,
            overlap_exponent=product.overlap_exponent,
            attention_compute=prompts.compute,
            kv_bandwidth=decodes.bandwidth,
            attention_seq_s=decodes.sequence_s,
            kernel_s=self.small_kernel_s,
            link=link.link,
            allreduce_s=link.latency_s,
            by_kernel=costs,
        )

    def _with_exchange(self, costs: KernelCosts, shard: Shard) -> KernelCosts:
        """With what takes tokens to experts on other ranks, where cores share them."""
        spread = shard.expert_ranks
        if spread.data > 1:
            gather, scatter = self._collectives(spread.exchanging, shard.gpu)
            costs = replace(costs, all_gather=gather, reduce_scatter=scatter)
        exchange = next((each for name, each in self.exchanges.items() if name == spread.backend), None)
        if exchange is None:
            return costs
        return replace(costs, exchange_s=exchange.floor_s, exchange_link=exchange.link)

    def _collectives(self, ranks: int, gpu: GPU) -> tuple[tuple[tuple[int, float], ...], ...]:
        """All-gathers and reduce-scatters between so many ranks, by size; empty where not both were timed."""
        gather, scatter = self.all_gather.get(ranks), self.reduce_scatter.get(ranks)
        return (self._by_size(gather, gpu), self._by_size(scatter, gpu)) if gather and scatter else ((), ())

    def _mixer(self, kind: str, kv: KvDtype) -> MixerCosts:
        """What layers that mix tokens otherwise than by grouped queries cost; see ``stand_ins``."""
        if kind in STATES:
            state = _STATES[kind]
            if state not in self.state_decodes:
                return replace(UNTIMED_STATE, bandwidth=self.decodes["bf16"].bandwidth)
            prompts, decodes = self.state_prompts[state], self.state_decodes[state]
            return MixerCosts(
                prompt_compute=1.0,
                bandwidth=decodes.bandwidth,
                passes=prompts.activation_passes,
                sequence_s=decodes.sequence_s,
                floor_s=decodes.floor_s,
                serial_s=prompts.serial_s,
                prompt_s=prompts.sequence_s,
            )
        sparse = kind == "sparse_mla"
        read = self.sparse_decodes if sparse else self.latent_decodes
        written = self.sparse_prompts if sparse else self.latent_prompts
        indexer = self.indexers.get(kv, UNTIMED_INDEXER)
        index = {"index_compute": indexer.compute, "index_bandwidth": indexer.bandwidth} if sparse else {}
        if kv not in read:
            own = self.decodes["bf16"]
            return MixerCosts(
                prompt_compute=self.prompts["bf16"].compute,
                compute=self.prompts["bf16"].compute,
                bandwidth=own.bandwidth,
                passes=self.prompts["bf16"].activation_passes,
                sequence_s=own.sequence_s,
                floor_s=own.floor_s * (UNTIMED_SPARSE_FLOORS if sparse else UNTIMED_LATENT_FLOORS),
                **index,
            )
        return MixerCosts(
            prompt_compute=written[kv].compute,
            compute=read[kv].compute,
            bandwidth=read[kv].bandwidth,
            passes=written[kv].activation_passes,
            sequence_s=read[kv].sequence_s,
            floor_s=read[kv].floor_s,
            **index,
        )

    def stand_ins(self, shard: Shard) -> list[str]:
        """What was not timed of a model's kernels, and what stands for it."""
        found = []
        kinds: list[tuple[str, Mapping[WeightDtype, Any], str]]
        kinds = [(shard.linear_kernel, self.products, "products")]
        if shard.model.moe_layers:
            kinds.append((shard.expert_kernel, self.experts, "experts"))
        for dtype, known, what in kinds:
            if dtype not in known and (other := _stand_in(known, dtype)):
                found.append(f"{what} of {dtype} as those of {other}")
        if shard.routed_by == "deep_gemm":
            found.append("experts in blocks of 128 rows by DeepGEMM's published timings, as in vLLM's images")
        for mixer in shard.model.layer_kinds:
            if mixer.kind in STATES:
                state = _STATES[mixer.kind]
                if state not in self.state_decodes:
                    found.append(f"{mixer.kind} layers by their bytes, with the H200's launches")
                elif state != mixer.kind:
                    found.append(f"{mixer.kind} layers as {state}")
            elif not mixer.attends and not (
                self.sparse_decodes if mixer.kind == "sparse_mla" else self.latent_decodes
            ):
                found.append(f"{mixer.kind} layers by grouped-query attention's kernels")
        spread = shard.expert_ranks
        if spread.data > 1 and spread.backend in self.exchanges and spread.exchanging != 8:
            found.append(f"{spread.backend} between {spread.exchanging} ranks as between 8")
        if spread.data > 1 and spread.backend == BACKENDS[0] and spread.exchanging not in self.all_gather:
            found.append(f"all-gathers between {spread.exchanging} ranks by their bytes")
        elif shard.context_ranks > 1 and shard.context_ranks not in self.all_gather:
            found.append(f"all-gathers between {shard.context_ranks} ranks by their bytes")
        return found

    def _by_size(self, link: AllReduce, gpu: GPU) -> tuple[tuple[int, float], ...]:
        """An all-reduce as timed; over another GPU's link, what is more than its latency in proportion."""
        timed = sorted(link.by_size.items())
        if not timed or gpu.name == self.gpu:
            return tuple(timed)
        own = find_gpu(self.gpu).link_bandwidth
        if own is None or gpu.link_bandwidth is None:
            return ()
        slower, least = own / gpu.link_bandwidth, timed[0][1]
        return tuple((size, least + max(0.0, seconds - least) * slower) for size, seconds in timed)

    def link_note(self, shard: Shard) -> str | None:
        """Why the all-reduces between a model's ranks are not the timed ones; None where they are."""
        return self._all_reduce(shard)[1]

    def _all_reduce(self, shard: Shard) -> tuple[AllReduce, str | None]:
        """All-reduces between a model's ranks, and where they come from if they were not timed."""
        gpu, ranks = shard.gpu, shard.tensor_parallel_size
        if ranks > 1 and not gpu.peer_to_peer and gpu.link_bandwidth:
            share = min(MOST_OF_PCIE, NO_PEERS / gpu.link_bandwidth)
            return AllReduce(latency_s=NO_PEERS_S, link=share), "PCIe without peer-to-peer"
        timed = self.all_reduce.get(ranks)
        return (timed, None) if timed else (TYPICAL_LINK, "typical value")


def nearest_timed(gpu: GPU, timed: Iterable[GPU]) -> GPU | None:
    """The GPU itself where it was timed; else the nearest in bandwidth of its compute capability, of its
    generation, or of the family that ``FAMILIES`` names; None where there is none."""
    timed = tuple(timed)
    wanted = _family(gpu).capability
    for near in (
        [each for each in timed if each.name == gpu.name],
        [each for each in timed if each.capability == wanted],
        [each for each in timed if each.capability[0] == wanted[0] > 8],
    ):
        if near:
            return min(near, key=lambda each: abs(math.log(each.bandwidth / gpu.bandwidth)))
    return None


def compute_factor(gpu: GPU, timed: GPU, share: float) -> float:
    """What a GPU reaches of its peaks, relative to the timed one that stands for it.

    A card with fewer watts for each FLOP/s of its peak lowers its clocks in products, by the power 2/3; one
    with more of them reaches nearly all of a peak that the maker set low, as GeForce's with fp32 sums.

    Args:
        share: of the 16-bit peak that the timed one reaches.
    """
    if gpu.name == timed.name or gpu.power is None or timed.power is None:
        return 1.0
    family = _family(gpu)
    watts = gpu.power / gpu.bf16_flops / (timed.power / timed.bf16_flops) * family.efficiency
    reached: float = min(family.most, share * watts**BY_POWER)
    return reached / share


def _family(gpu: GPU) -> Family:
    return FAMILIES.get(gpu.capability, Family(gpu.capability))


_T = TypeVar("_T")


def _stand_in(known: Mapping[WeightDtype, Any], dtype: str) -> WeightDtype | None:
    """The dtype that was timed and is nearest to another: itself, or as ``STAND_INS`` says."""
    return next((each for each in (dtype, *STAND_INS.get(dtype, ())) if each in known), None)  # type: ignore


def _of(known: Mapping[WeightDtype, _T], dtype: str, gpu: str, what: str) -> _T:
    """The constants of a dtype, or of the one that stands for it."""
    found = _stand_in(known, dtype)
    if found is not None:
        return known[found]
    raise InputError(
        f"there are no timings of {dtype} {what} on a {gpu}",
        where="profile",
        fix=f"Use {', '.join(known)}, a profile measured on this GPU, or profile: physics.",
    )
