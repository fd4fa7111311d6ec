"""What vLLM's profile run finds a model to take beside its weights, on one rank.

At its start vLLM runs the model once on ``max_num_batched_tokens`` tokens and samples ``max_num_seqs`` of
them, and takes the peak of that, and what CUDA allocates outside of PyTorch, from the KV cache
(``Worker.determine_available_memory``). What PyTorch allocates follows from the code that runs: the terms
below are the tensors that are alive together at its peaks. What is outside of PyTorch does not follow; it
is a constant by release and ranks, from the memory parts that servers logged (tests/data/kv_logs).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from servecast.sim.hardware.expert_ranks import BACKENDS
from servecast.sim.hardware.shard import Shard, release

CompileCache = Literal["warm", "cold"]

MIB, GIB = 1 << 20, 1 << 30
_V2_FAMILIES = ("llama", "mistral", "qwen3")  # 0.23 runs these on Model Runner V2, dense and unquantised
_SORT_BYTES, _SMALL_SORT_BYTES = 32, 44  # of torch.sort: values, indices, and the copies of its radix sort
_SMALL_SORT_ROWS = 128  # below it torch.sort sorts all rows as one
_LOW_LATENCY_TOKENS = 256  # VLLM_MOE_DP_CHUNK_SIZE
_GRAPH_BYTES_PER_LAYER = 200 * 1024  # logs: 0.2 to 0.3 MiB a layer and graph


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes, what they are, and how many more or fewer they may be."""

    bytes: int
    note: str
    more: int = 0
    less: int = 0


def runs_on_v2(shard: Shard, version: str) -> bool:
    """Whether vLLM runs the model on its Model Runner V2: nothing before 0.23, all models from 0.32 on."""
    model = shard.model
    if release(version) >= (0, 32):
        return True
    plain = not model.moe_layers and model.weight_bytes_each == model.dtype_bytes
    return release(version) >= (0, 23) and plain and model.model_type in _V2_FAMILIES


def rotary_table(shard: Shard) -> Estimate:
    """Cosines and sines of every position, which are loaded with the weights."""
    model = shard.model
    positions = model.max_position_embeddings or 0
    width = max((mixer.rope_dim for mixer in model.layer_kinds), default=0) or model.head_dim
    return Estimate(positions * width * model.dtype_bytes, f"{positions} positions")


def activation_peak(
    shard: Shard,
    *,
    version: str,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    compile_cache: CompileCache = "warm",
) -> Estimate:
    """The peak of PyTorch's allocations in the profile run: the workspace of cuBLAS, that of the experts, and
    the largest of

    - the sampler: logits, their copies, and the hidden states of all tokens;
    - a layer: residual, hidden states, attention output and their sum, and the MLP's gate, up and product;
    - with a cold compile cache, a table of random embeddings: Inductor times the kernel that looks them up
      (``benchmark_combo_kernel``), on arguments of its own.
    """
    model = shard.model
    hidden = max_num_batched_tokens * model.hidden_size * model.dtype_bytes
    mlp = 3 * model.intermediate_size // shard.tensor_parallel_size
    rows = min(max_num_seqs, max_num_batched_tokens) if shard.samples else 0
    peaks = {
        "sampler": hidden + _sampler_bytes(shard, rows, version),
        "a layer": 4 * hidden + max_num_batched_tokens * mlp * model.dtype_bytes,
    }
    cold = _compile_bytes(shard, version, hidden)
    if compile_cache == "cold":
        peaks["compilation"] = cold
    largest = max(peaks, key=peaks.__getitem__)
    lasting = _cublas_workspace(shard) + _expert_workspace(shard, max_num_batched_tokens)
    spread = peaks[largest] // 20
    more = max(spread, cold - peaks[largest] if compile_cache == "warm" else 0)
    note = f"largest in {largest}; {compile_cache} compile cache"
    return Estimate(lasting + peaks[largest], note, more=more, less=spread)


def _sampler_bytes(shard: Shard, rows: int, version: str) -> int:
    """Of ``rows`` sampled tokens: their hidden states, and at the peak of the sampler, by the logit,

    - on Model Runner V1: the logits, their copy in 32 bits, and behind the top-k and top-p filter the
      probabilities and the noise that they are divided by. The filter sorts the copy up to 0.16; from 0.17 on
      it is a Triton kernel with a buffer of one row a multiprocessor.
    - on V2: the logits and, before 0.32, their copy. Ranks gather the logits, which doubles them for a
      moment.
    """
    model, since = shard.model, release(version)
    logits = rows * model.vocab_size
    states = rows * model.hidden_size * model.dtype_bytes
    copies = model.dtype_bytes + (4 if model.dtype_bytes != 4 else 0)
    if runs_on_v2(shard, version):
        if since >= (0, 32):
            copies = model.dtype_bytes * (1 if shard.tensor_parallel_size == 1 else 2)
        return states + logits * copies
    if since < (0, 17):
        sort = _SORT_BYTES if rows >= _SMALL_SORT_ROWS else _SMALL_SORT_BYTES
        return 2 * states + logits * (copies + sort)
    multiprocessors = shard.gpu.sms or 128
    programs = min(rows, multiprocessors)
    buffer = min(1 << (programs - 1).bit_length(), multiprocessors) * model.vocab_size * 4
    return 2 * states + buffer + logits * (copies + 8)


def _compile_bytes(shard: Shard, version: str, hidden: int) -> int:
    """Peak of a cold compilation; combined kernels, which are timed, came with torch 2.9 in 0.12."""
    if release(version) < (0, 12) or not shard.cudagraph_sizes:
        return 0
    model = shard.model
    return model.vocab_size * model.hidden_size // shard.tensor_parallel_size * model.dtype_bytes + 2 * hidden


def _cublas_workspace(shard: Shard) -> int:
    """PyTorch's default, which is larger on Hopper and on Blackwell's server GPUs."""
    return 32 * MIB if shard.gpu.capability[0] in (9, 10) else 8_519_680


def _expert_workspace(shard: Shard, tokens: int) -> int:
    """Both workspaces of the fused experts: every token's input and product, once for each of its experts; or
    once for each row of DeepGEMM's blocks."""
    model = shard.model
    if not model.moe_layers:
        return 0
    spread = shard.expert_ranks
    width = model.expert_intermediate_size // spread.split
    tokens *= spread.data  # every rank gets those of all cores
    numbers = max(width, model.hidden_size) + max(2 * width, model.hidden_size)
    if shard.routed_by == "deep_gemm":
        rows = spread.block_rows(model.experts, tokens * model.experts_per_token)
        return rows * (2 * width + max(width, model.hidden_size)) * model.dtype_bytes
    return tokens * model.experts_per_token * numbers * model.dtype_bytes


def outside_torch(shard: Shard, *, version: str) -> Estimate:
    """Libraries, their handles and kernels, and NCCL: logged in 0.11 to 0.19 on the H100, once on an RTX
    4090.

    From 0.14 on, ranks linked by NVLink hold the buffers of fused all-reduces, too.
    """
    server = shard.gpu.capability[0] in (9, 10)
    if shard.expert_ranks.ranks > 1 or shard.stage[1] > 1:
        if shard.tensor_parallel_size > 1 and release(version) >= (0, 14) and server:
            return Estimate(int(2.15 * GIB), "with NCCL and fused all-reduce", more=GIB // 4, less=GIB // 2)
        return Estimate(int(0.55 * GIB), "with NCCL", more=GIB // 2, less=GIB // 4)
    if release(version) >= (0, 18) and server:
        return Estimate(int(0.25 * GIB), "libraries and kernels", more=GIB // 10, less=GIB // 10)
    return Estimate(int(0.13 * GIB), "libraries and kernels", more=GIB // 5, less=GIB // 10)


def exchange_buffers(shard: Shard) -> Estimate:
    """Of DeepEP (``DeepEPHTAll2AllManager``, VLLM_DEEPEP_BUFFER_SIZE_MB; of the low-latency kernels what
    ``get_low_latency_rdma_size_hint`` asks for: twice what is sent to and got from every expert by 256
    tokens a rank)."""
    model, spread = shard.model, shard.expert_ranks
    if spread.backend == BACKENDS[1]:
        return Estimate(GIB, "DeepEP's over NVLink")
    if spread.backend == BACKENDS[2]:
        experts = model.experts + spread.redundant
        message = 16 + 2 * (model.expert_input_size or model.hidden_size)
        return Estimate(
            2 * 2 * experts * _LOW_LATENCY_TOKENS * message, "DeepEP's of the low-latency kernels"
        )
    return Estimate(0, "none")


def adapter_slots(shard: Shard) -> Estimate:
    """Slots of LoRA adapters, filled or not; models that adapt embeddings and LM head, too, have more."""
    model = shard.model
    ends = 2 * (model.vocab_size // shard.tensor_parallel_size + model.hidden_size) * shard.lora_rank
    each = model.dtype_bytes * shard.lora_slots
    return Estimate(
        shard.lora_numbers * each, f"{shard.lora_slots} slots of rank {shard.lora_rank}", more=ends * each
    )


def cuda_graphs(shard: Shard, *, version: str, max_num_seqs: int) -> Estimate:
    """vLLM's own estimate of its CUDA graphs, which it takes from the pool from 0.21 on, but on Model
    Runner V2 only from 0.32 on (before, that estimates none): 200 KiB a layer and graph, after logs."""
    charged = release(version) >= ((0, 32) if runs_on_v2(shard, version) else (0, 21))
    piecewise = len(shard.cudagraph_sizes)
    full = sum(size <= max_num_seqs for size in shard.cudagraph_sizes)  # those are for pure decode batches
    if not charged or not piecewise:
        return Estimate(0, "none are estimated")
    taken = (full + piecewise) * shard.model.layers * _GRAPH_BYTES_PER_LAYER
    return Estimate(taken, f"{full} full and {piecewise} piecewise graphs", more=taken // 2, less=taken // 2)
