"""``vllm serve``'s flags of data, expert and decode context parallelism: what they come to, and what vLLM
refuses of them."""

from __future__ import annotations

from typing import Any

from servecast.sim.engine.data_parallel import DataParallel, balancing_of, sync_interval_of
from servecast.sim.engine.rules import since
from servecast.sim.hardware.expert_ranks import BACKENDS, FALLS_BACK, ExpertRanks, Kernel
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import release as numbers
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.engine_flags import EngineFlags

_CONTEXT = "decode_context_parallel_size"
_EXTERNAL_REFUSED_SINCE = "0.21"  # external balancing of a dense model
_ASYNC_EPLB_SINCE = "0.23"  # EPLBConfig.use_async by default
_EIGHT_BIT_LATENTS_SINCE = "0.25"  # MLAAttention.forward_impl: "DCP not support fp8 kvcache now"
_BLACKWELL_SUMS_SINCE = "0.25"  # FlashInferMLAImpl.can_return_lse_for_decode
_MIXED_GROUPS_SINCE = "0.26"  # HybridKVCacheCoordinator: "DCP not support hybrid attn now"
_A2A_FREELY_SINCE = "0.29"  # ParallelConfig: a dcp_comm_backend of its own
_PADS_BY_STEP_SINCE = (0, 17)  # before, with CUDA graphs, steps without one are padded, too
_COMMON_CADENCE_SINCE = "0.24"  # --prefill-schedule-interval of cores in lockstep


def data_parallel(flags: EngineFlags, release: str, model: ModelShape, where: str) -> DataParallel | None:
    """The cores of a server; None for one.

    Args:
        release: of ``RELEASES``, whose rules hold.

    Raises:
        InputError: vLLM refuses the flags, or they are not modelled.
    """
    size, local, moe = flags.data_parallel_size, flags.data_parallel_size_local, model.moe_layers > 0
    external = flags.data_parallel_external_lb or flags.data_parallel_rank is not None
    external |= flags.data_parallel_multi_port_external_lb
    hybrid = flags.data_parallel_hybrid_lb or flags.data_parallel_start_rank is not None
    if external and hybrid:
        raise _refused("both external and hybrid balancing", where, "data_parallel_hybrid_lb", "Choose one")
    if size == 1:
        if external or hybrid or (local or 1) > 1:
            raise _refused("ranks of a data_parallel_size of 1", where, "data_parallel_size", "Raise it")
        if (flags.api_server_count or 1) > 1:
            raise InputError(
                f"{flags.api_server_count} API servers in front of one engine core are not modelled",
                where=f"{where}.api_server_count",
                fix="Leave it out: one is simulated.",
            )
        return None
    rank = flags.data_parallel_rank or 0
    if rank >= size or (local or 1) > size:
        what, name = (
            (f"data_parallel_rank {rank}", "rank")
            if rank >= size
            else (f"data_parallel_size_local {local}", "size_local")
        )
        raise _refused(
            f"{what} with a data_parallel_size of {size}", where, f"data_parallel_{name}", "Lower it"
        )
    if external and not moe and since(release, _EXTERNAL_REFUSED_SINCE):
        raise _refused(
            f"external balancing of {model.name}, which has no experts",
            where,
            "data_parallel_external_lb",
            "Use fleet.replicas",
        )
    if external and (local or 1) != 1:
        raise _refused(
            "external balancing of several local ranks", where, "data_parallel_size_local", "Drop it"
        )
    if hybrid and local is None:
        raise _refused("hybrid balancing", where, "data_parallel_size_local", "Give the ranks of a node")
    behind = 1 if external else local if hybrid and local else size
    if size % behind:
        raise InputError(
            f"{size} ranks over nodes of {behind} are not modelled",
            where=f"{where}.data_parallel_size_local",
            fix="Use a size that divides data_parallel_size.",
        )
    if external and (flags.api_server_count or 1) > 1:
        raise InputError(
            "several API servers in front of one engine core are not modelled",
            where=f"{where}.api_server_count",
            fix="Leave it out.",
        )
    interval, first = sync_interval_of(release)
    cadence = flags.prefill_schedule_interval if moe and since(release, _COMMON_CADENCE_SINCE) else 1
    return DataParallel(
        size=size,
        local=behind,
        api_servers=flags.api_server_count or behind,
        lockstep=moe,
        balancing=balancing_of(release),
        sync_interval=flags.dp_sync_interval or interval,
        sync_first=first,
        prefill_schedule_interval=cadence,
    )


def expert_ranks(flags: EngineFlags, release: str, model: ModelShape, where: str) -> ExpertRanks:
    """How the routed experts lie on the ranks. Raises as ``data_parallel``."""
    tensor, data = flags.tensor_parallel_size, flags.data_parallel_size if model.moe_layers else 1
    redundant, use_async = _eplb(flags, release, where)
    if not model.moe_layers:
        if flags.enable_expert_parallel or flags.enable_eplb:
            name = "enable_expert_parallel" if flags.enable_expert_parallel else "enable_eplb"
            raise _refused(f"{name} with {model.name}, which has no experts", where, name, "Leave it out")
        return ExpertRanks(tensor)
    ranks, whole = tensor * data, flags.enable_expert_parallel and tensor * data > 1
    if flags.enable_eplb and not whole:
        raise _refused(
            "enable_eplb without expert parallelism over several ranks",
            where,
            "enable_eplb",
            "Set enable_expert_parallel, and a tensor_parallel_size or data_parallel_size above 1",
        )
    if redundant and not flags.enable_eplb:
        raise _refused("num_redundant_experts without EPLB", where, "eplb_config", "Set enable_eplb")
    if flags.enable_eplb and (model.experts + redundant) % ranks:
        raise _refused(
            f"{model.experts} experts and {redundant} redundant ones over {ranks} ranks",
            where,
            "eplb_config",
            f"Make num_redundant_experts {-model.experts % ranks} or more by {ranks}",
        )
    if whole and model.experts < ranks:
        raise InputError(
            f"{model.experts} experts are fewer than the {ranks} ranks",
            where=f"{where}.enable_expert_parallel",
            fix="Use fewer ranks.",
        )
    backend = FALLS_BACK.get(flags.all2all_backend, flags.all2all_backend)
    if backend not in BACKENDS and data > 1 and whole:
        raise InputError(
            f"nothing is known of the times of the all2all_backend {backend}",
            where=f"{where}.all2all_backend",
            fix=f"Use {', '.join(BACKENDS)}.",
        )
    return ExpertRanks(
        tensor,
        data,
        whole=whole,
        backend=backend if whole else "allgather_reducescatter",
        redundant=redundant,
        rebalanced_every=int((flags.eplb_config or {}).get("step_interval", 3000))
        if flags.enable_eplb
        else 0,
        rebalanced_behind=use_async,
        padded_alike=numbers(flags.version) < _PADS_BY_STEP_SINCE,  # allow_dp_padding
        kernel=_expert_kernel(flags, whole=whole, ranks=ranks),
    )


def context_ranks(flags: EngineFlags, release: str, model: ModelShape, gpu: GPU, where: str) -> int:
    """Ranks that share a sequence's KV out. Raises as ``data_parallel``."""
    ranks, size, name = flags.tensor_parallel_size, flags.decode_context_parallel_size, _CONTEXT
    if size == 1:
        if flags.dcp_comm_backend == "a2a" and not since(release, _A2A_FREELY_SINCE):
            raise _refused("dcp_comm_backend a2a of one rank", where, "dcp_comm_backend", "Leave it out")
        return 1
    if ranks % size:
        what = f"a tensor_parallel_size of {ranks} by {size} context-parallel ranks"
        raise _refused(what, where, name, "Use a size that divides it")
    kinds = {mixer.kind for mixer in model.layer_kinds}
    if len(kinds) > 1 or not kinds <= {"full", "mla"}:
        what, fix = f"context-parallel ranks of {model.name}, whose layers are not all alike", "Leave it out"
        if kinds & {"sliding", "chunked"} or not since(release, _MIXED_GROUPS_SINCE):
            raise _refused(what, where, name, fix)
        raise InputError(f"{what} or of other kinds, is not modelled", where=f"{where}.{name}", fix=f"{fix}.")
    if kinds == {"full"}:
        _check_heads(model, ranks, size, where)
    elif flags.kv_cache_dtype.startswith("fp8") and not since(release, _EIGHT_BIT_LATENTS_SINCE):
        raise _refused("latents in fp8 over context-parallel ranks", where, "kv_cache_dtype", "Use auto")
    blackwell = kinds == {"mla"} and gpu.capability[0] == 10 and not since(release, _BLACKWELL_SUMS_SINCE)
    if gpu.name.lower() == "cpu" or blackwell:
        what = f"attention on a {gpu.name} without log-sum-exps, which context-parallel ranks need"
        raise _refused(what, where, name, "Leave it out")
    if flags.speculative_config is not None or flags.kv_transfer is not None:
        beside = "drafts" if flags.speculative_config is not None else "KV connectors"
        raise InputError(
            f"{beside} with decode context parallelism are not modelled",
            where=f"{where}.{name}",
            fix="Use one of the two.",
        )
    return size


def check_interleaving(flags: EngineFlags, block_size: int, where: str) -> None:
    """Whether a block, of so many tokens on all ranks, can be dealt out as the flags say. Raises as
    ``data_parallel``."""
    older = flags.dcp_kv_cache_interleave_size
    dealt, own = older if older > 1 else flags.cp_kv_cache_interleave_size, block_size
    own //= flags.decode_context_parallel_size
    if flags.decode_context_parallel_size > 1 and own % dealt:
        what = f"{dealt} tokens in a row of blocks of {own}"
        raise _refused(what, where, "cp_kv_cache_interleave_size", "Use a number that divides the block")


def _check_heads(model: ModelShape, ranks: int, size: int, where: str) -> None:
    """ModelConfig.verify_with_parallel_config, of grouped-query attention."""
    keys = model.kv_heads
    if ranks <= keys:
        what = f"context-parallel ranks of {model.name}, whose {keys} KV heads {ranks} ranks do not repeat"
        raise _refused(what, where, _CONTEXT, f"Use a tensor_parallel_size above {keys}, or leave it out")
    if size > ranks // keys:
        what = f"{size} context-parallel ranks: {ranks} hold {ranks // keys} copies of each KV head"
        raise _refused(what, where, _CONTEXT, f"Use at most {ranks // keys}")
    if model.heads // keys % size:
        what = f"{model.heads // keys} query heads of a KV head by {size} context-parallel ranks"
        raise _refused(what, where, _CONTEXT, "Use a size that divides them")


def _expert_kernel(flags: EngineFlags, *, whole: bool, ranks: int) -> Kernel:
    """What vLLM's images multiply fp8 experts with scales of blocks by, on Hopper.

    From 0.12 to 0.15 DeepGEMM, unless each expert is split over eight ranks or more (quantization/fp8.py,
    later fused_moe/oracle/fp8.py: get_fp8_moe_backend), at every number of tokens, since its scales are
    powers of two by default (TritonOrDeepGemmExperts.apply). In 0.16 FlashInfer's CUTLASS, from 0.17 on for
    whole experts only (select_fp8_moe_backend, _get_priority_backends). Behind DeepEP Triton stands for all.
    """
    release, asked = numbers(flags.version), flags.moe_backend
    if asked != "auto":
        return "cutlass" if asked == "flashinfer_cutlass" else asked
    if whole and flags.data_parallel_size > 1 and flags.all2all_backend.startswith("deepep"):
        return "triton"
    if (0, 12) <= release < (0, 16):
        return "deep_gemm" if whole or ranks < 8 else "triton"
    return "cutlass" if release == (0, 16) or (whole and release > (0, 16)) else "triton"


def notes(flags: EngineFlags) -> list[str]:
    """What of the flags is taken otherwise than given, or without effect."""
    said = []
    if flags.all2all_backend in FALLS_BACK and flags.data_parallel_size > 1:
        said.append(f"all2all_backend {flags.all2all_backend} is {FALLS_BACK[flags.all2all_backend]}")
    if flags.moe_backend not in ("auto", "marlin"):
        said.append(f"moe_backend {flags.moe_backend} is for fp8 with scales of blocks on Hopper only")
    if flags.data_parallel_rank is not None or flags.data_parallel_start_rank is not None:
        said.append(f"all {flags.data_parallel_size} data-parallel ranks are simulated, not one node's alone")
    if flags.decode_context_parallel_size > 1:
        said.append(
            "decode context parallelism: what its ranks exchange is timed by collectives, on no server, and "
            "the error bands are wider for it"
        )
    if flags.data_parallel_size > 1 and flags.data_parallel_backend == "ray":
        said.append("data_parallel_backend ray is simulated as mp")
    return said


def _eplb(flags: EngineFlags, release: str, where: str) -> tuple[int, bool]:
    """Redundant experts, and whether weights move while steps run."""
    config: dict[str, Any] = flags.eplb_config or {}
    known: tuple[str, ...] = (
        "window_size",
        "step_interval",
        "num_redundant_experts",
        "use_async",
        "policy",
        "communicator",
    )
    known += ("log_balancedness", "log_balancedness_interval", "enable_migration_batching")
    for name in config:
        if name not in known:
            raise _refused(f"eplb_config.{name}", where, "eplb_config", f"Use {', '.join(known)}")
    numbers = [config.get("num_redundant_experts", 0), config.get("step_interval", 1)]
    if not all(isinstance(n, int) and n >= least for n, least in zip(numbers, (0, 1), strict=True)):
        raise _refused(f"eplb_config {config}", where, "eplb_config", "Give whole numbers")
    return numbers[0], bool(config.get("use_async", since(release, _ASYNC_EPLB_SINCE)))


def _refused(what: str, where: str, name: str, fix: str) -> InputError:
    return InputError(what, where=f"{where}.{name}", fix=f"{fix}: vLLM refuses this.")
