"""A model on a GPU, split over ranks: what one rank holds, reads and computes.

A rank is one GPU of a tensor-parallel group, split as vLLM splits it: heads, the MLP's intermediate size
(every expert's too) and the vocabulary are divided, KV heads are divided until one is left and then repeated,
norms and the router are repeated. ``ModelShape`` counts weights; what they come to on a rank, in bytes and in
FLOPs (a multiply-add as two), is counted here, with all that a deployment's flags change about it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from servecast.sim.engine.kv_groups import token_bytes
from servecast.sim.hardware.expert_ranks import ExpertRanks, Kernel
from servecast.sim.hardware.expert_use import fullest_rank, most_touched, touched
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.inputs.errors import InputError

# what a product takes beside its columns, as many columns more: see gpu_constants.DEEP_GEMM
DEEP_GEMM_COLUMNS = 692
_BY_MARLIN = {"fp8": "bf16", "fp8_block": "bf16", "nvfp4": "int4", "mxfp4": "int4"}
_FP32_ROUTERS = ("minimax_m2",)  # vLLM's MiniMaxM2MoE: params_dtype=torch.float32
_FP32_SHARE = {  # compute capability -> fp32 peak of the datasheet over that of 16 bits on tensor cores
    (8, 0): 1 / 16,
    (9, 0): 1 / 15,
    (10, 0): 1 / 28,
    (10, 3): 1 / 28,
}


@dataclass(frozen=True)  # no slots: what is asked for at every number of tokens is kept
class Shard:
    """One rank of a model on GPUs. All that is derived from it is of one rank, too.

    Attributes:
        model, gpu: sizes and peaks.
        tensor_parallel_size: ranks that the model is split over. There is no default.
        kv_dtype_bytes: of a number in the KV cache: 2, or 1 for ``--kv-cache-dtype fp8``.
        context_ranks: of them those that share the tokens of a sequence's KV out between them;
            context_backend: how they exchange, "ag_rs" or "a2a".
        experts: how the routed experts lie on the ranks; None: split over the tensor-parallel ones. Where
            they are whole the fullest rank is waited for.
        pipeline: layers of each pipeline stage, where there are several; what is counted here is of all of
            them together, ``stages`` are the shards of each. stage: which of how many this is.
            stages_per_node: that lie in one node; network: bytes/s of each GPU's own way to another node.
        lora_rank, lora_slots: ``--max-lora-rank`` and ``--max-loras``, 0 without adapters.
        cudagraph_sizes: rising, from ``cudagraph_capture_sizes``; empty for ``--enforce-eager``.

    Raises:
        InputError: vLLM could not split the model over that many ranks, or has no kernel of this GPU for its
        weights.
    """

    model: ModelShape
    gpu: GPU
    tensor_parallel_size: int
    kv_dtype_bytes: int = 2
    experts: ExpertRanks | None = None
    cudagraph_sizes: tuple[int, ...] = ()
    pipeline: tuple[int, ...] = ()
    stage: tuple[int, int] = (0, 1)
    stages_per_node: int = 1 << 30
    network: float = 50e9
    context_ranks: int = 1
    context_backend: str = "ag_rs"
    lora_rank: int = 0
    lora_slots: int = 0

    def __post_init__(self) -> None:
        model, ranks = self.model, self.tensor_parallel_size
        if ranks < 1 or model.heads % ranks or (model.kv_heads % ranks and ranks % model.kv_heads):
            raise InputError(
                f"{model.name} with {model.heads} heads and {model.kv_heads} KV heads "
                f"cannot be split {ranks} ways",
                where="tensor_parallel_size",
                fix="Use a size that divides the heads.",
            )
        if model.weight_block and self.expert_ranks.ranks > 1:
            self._refuse_cut_blocks()
        major, minor = self.gpu.capability
        if 0 < 10 * major + minor < model.least_capability:
            raise InputError(
                f"vLLM runs weights of {model.expert_format or model.quantised} from compute capability "
                f"{model.least_capability / 10:g} on, and {self.gpu.name} has {major}.{minor}",
                where="gpu",
                fix="Use a newer GPU, or weights of 16 bits.",
            )

    def _refuse_cut_blocks(self) -> None:
        """Weights that are quantised by blocks are split between blocks only: of rows and of columns where
        fp8 has a scale for both, else of what a product sums over."""
        model, ranks = self.model, self.tensor_parallel_size
        mlps = model.weight_bytes_each != model.dtype_bytes
        mixers = (
            mlps if model.attention_bytes_each is None else model.attention_bytes_each != model.dtype_bytes
        )
        spread = self.expert_ranks
        whole = spread.whole or model.expert_format == "mxfp4"  # whose columns vLLM pads
        widths = {
            "an expert": 0 if whole else model.expert_intermediate_size // spread.split,
            "the shared expert": model.shared_expert_size // ranks * mlps,
            "the MLP": model.intermediate_size // ranks * mlps if model.dense_layers else 0,
        }
        for mixer in model.layer_kinds if mixers else ():
            widths["the attention output"] = mixer.heads // ranks * mixer.value_dim
            if mixer.attends and model.quantised == "fp8_block":
                widths["the queries"] = mixer.heads // ranks * mixer.head_dim
                widths["the keys"] = max(1, mixer.kv_heads // ranks) * mixer.head_dim
        for what, width in widths.items():
            if width % model.weight_block:
                routed = what == "an expert"
                parts, more = (spread.split, "--enable-expert-parallel, or ") if routed else (ranks, "")
                raise InputError(
                    f"split {parts} ways, {what} of {model.name} has {width} columns, no multiple of the "
                    f"{model.weight_block} of a block of its quantised weights: vLLM refuses it",
                    where="tensor_parallel_size",
                    fix=f"Use {more}fewer ranks.",
                )

    @property
    def whole(self) -> Shard:
        """The whole model on one rank: what all ranks do together, without what they repeat."""
        return replace(self, tensor_parallel_size=1, experts=None)

    @property
    def stages(self) -> tuple[Shard, ...]:
        """A rank of each pipeline stage; itself where there is one."""
        if not self.pipeline:
            return (self,)
        ends = list(accumulate(self.pipeline))
        return tuple(
            replace(
                self,
                model=self.model.stage(end - layers, end),
                pipeline=(),
                stage=(place, len(self.pipeline)),
            )
            for place, (layers, end) in enumerate(zip(self.pipeline, ends, strict=True))
        )

    @property
    def samples(self) -> bool:
        """Whether it has the LM head: the last stage."""
        place, stages = self.stage
        return place == stages - 1

    @property
    def expert_ranks(self) -> ExpertRanks:
        """Where the routed experts lie."""
        return self.experts or ExpertRanks(self.tensor_parallel_size)

    def padded(self, tokens: int, requests: int = 0) -> int:
        """The tokens that a step of so many computes: the next CUDA-graph size while there is one. With
        ``requests``, that each have as many of them, the next graph of such a batch, whose sizes are the
        others rounded up to multiples of what a request has (cudagraph_utils.py, V1: compilation.py)."""
        sizes = self.cudagraph_sizes
        if requests and sizes and tokens % requests == 0:
            each = tokens // requests
            at = bisect_left(sizes, tokens - each + 1)
            for size in sizes[at:]:
                rounded = -(-size // each) * each
                if rounded > sizes[-1]:
                    break
                if rounded >= tokens:
                    return rounded
            return tokens
        at = bisect_left(sizes, tokens)
        return sizes[at] if at < len(sizes) else tokens

    # -- weights -----------------------------------------------------------------------------------

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, tied embeddings once."""
        model, ranks = self.model, self.tensor_parallel_size
        linear = self._shared_bytes + self.held_expert_bytes
        first = self.stage[0] == 0  # tied embeddings are in the first stage, and again in the last
        tables = first or self.samples if model.tied_embeddings else first + self.samples
        embeddings = model.vocab_size * model.hidden_size // ranks * tables
        small = (embeddings + model.small_weights) * model.dtype_bytes
        return round(linear) + small + self._absorbed_bytes

    @property
    def _absorbed_bytes(self) -> int:
        """Of latent attention vLLM keeps what projects latents to keys and values in 16 bits, too, if those
        weights are quantised (``MLAAttention.process_weights_after_loading``)."""
        model = self.model
        stored = model.attention_bytes_each
        if (model.weight_bytes_each if stored is None else stored) == model.dtype_bytes:
            return 0
        ups = sum(
            mixer.count * each.weights(self.tensor_parallel_size)
            for mixer in model.layer_kinds
            for each in mixer.linears(model.hidden_size)
            if each.module.endswith("kv_b_proj")
        )
        return ups * model.dtype_bytes

    # -- linear layers -----------------------------------------------------------------------------

    @property
    def routed_by(self) -> Kernel:
        """What multiplies the routed experts where there is a choice, and "triton" where there is none."""
        kernel = self.expert_ranks.kernel
        choice = self.expert_kernel == "fp8_block" and self.gpu.capability == (9, 0)
        return kernel if choice or kernel == "marlin" else "triton"

    @property
    def linear_kernel(self) -> str:
        """The dtype, as in ``gpu_constants.WeightDtype``, whose timings tell how the linear layers that every
        token passes are multiplied on this GPU."""
        return _kernel(self.model.quantised, self.gpu, self.model)

    @property
    def expert_kernel(self) -> str:
        """The same of the routed experts. Marlin reads them as they are and multiplies in 16 bits."""
        dtype = self.model.expert_format or self.model.quantised
        if self.expert_ranks.kernel == "marlin":
            dtype = _BY_MARLIN.get(dtype, dtype)
        return _kernel(dtype, self.gpu, self.model)

    @cached_property
    def linear_peak(self) -> float:
        """Peak of the linear layers' matrix products, FLOP/s."""
        return self.gpu.peak_flops(self.linear_kernel) or self.gpu.bf16_flops

    @cached_property
    def expert_peak(self) -> float:
        """Peak of the routed experts' products, FLOP/s."""
        return self.gpu.peak_flops(self.expert_kernel) or self.gpu.bf16_flops

    @property
    def linear_flops_per_token(self) -> float:
        """FLOPs of the linear layers that every token passes for one of them, the LM head left out. A router
        in fp32, which tensor cores do not multiply, counts for as many as take as long."""
        model, ranks = self.model, self.tensor_parallel_size
        router = float(model.router_weights)
        if model.model_type in _FP32_ROUTERS:
            router *= self.linear_peak / (self.gpu.bf16_flops * _FP32_SHARE.get(self.gpu.capability, 1 / 4))
        return 2.0 * (model.shared_weights(ranks) + model.moe_layers * router)

    def linear_bytes(self, tokens: int) -> float:
        """Weight bytes that a step of ``tokens`` tokens reads, the LM head left out. Experts count as
        ``expert_bytes`` says."""
        model = self.model
        if not model.moe_layers:
            return float(self._shared_bytes)
        read = self._shared_bytes + self.expert_bytes(tokens)
        return read + model.moe_layers * model.router_weights * model.dtype_bytes

    @cached_property
    def _shared_bytes(self) -> int | float:
        """Weight bytes of all linear layers that every token passes."""
        model, ranks = self.model, self.tensor_parallel_size
        each = model.weight_bytes_each
        mixers = each if model.attention_bytes_each is None else model.attention_bytes_each
        return model.mixer_weights(ranks) * mixers + model.mlp_weights(ranks) * each

    @cached_property
    def _expert_bytes_each(self) -> int | float:
        """Of a weight of the routed experts. vLLM pads those of mxfp4 for its kernels (``oracle/mxfp4.py``):
        on Hopper gpt-oss's to 64 columns a rank but for Marlin, elsewhere to 128, and the hidden size to
        256."""
        model = self.model
        each = model.weight_bytes_each if model.expert_bytes_each is None else model.expert_bytes_each
        if model.expert_format != "mxfp4":
            return each
        triton = model.model_type == "gpt_oss" and self.gpu.capability[0] == 9
        triton = triton and self.expert_ranks.kernel != "marlin"
        columns, rows = (64, 1) if triton else (128, 256)
        width = model.expert_intermediate_size
        width //= self.expert_ranks.split
        hidden = model.expert_input_size or model.hidden_size
        padded = -(-width // columns) * columns * -(-hidden // rows) * rows
        return each * padded / (width * hidden)

    @cached_property
    def product_bytes_per_token(self) -> float:
        """Bytes of activations a token that the linear layers read and write, routed experts and the LM head
        left out."""
        moved = sum(count * each.moved(self.tensor_parallel_size) for count, each in self.model.linears())
        return float(moved * self.model.dtype_bytes)

    @property
    def held_expert_bytes(self) -> float:
        """Bytes of the routed experts that a rank holds."""
        model, spread = self.model, self.expert_ranks
        weights = model.moe_layers * spread.held(model.experts) * model.expert_weights(spread.split)
        return weights * self._expert_bytes_each

    @property
    def dispatched_bytes(self) -> float:
        """Of a number that goes to experts on other ranks: quantised as they want it, scales included
        (MoEPrepareAndFinalizeNaiveDPEP, _quantize_and_setup_dispatch)."""
        each = {"fp8": 1.0, "fp8_block": 1.0 + 4 / 128, "nvfp4": 0.5 + 1 / 16, "mxfp4_mxfp8": 1.0 + 1 / 32}
        return each.get(self.expert_kernel, float(self.model.dtype_bytes))

    # -- routed experts: of all tokens of a server, which its engine cores share -----------------------

    def expert_flops(self, tokens: int) -> float:
        """FLOPs of the experts that ``tokens`` tokens are sent to, all layers; on the fullest rank. In blocks
        of all rows that are computed, with what a product of DeepGEMM takes beside its columns."""
        if self.routed_by == "deep_gemm":
            model, width = self.model, self._expert_width
            into = (model.mlp_products - 1) * width * (self._expert_input + DEEP_GEMM_COLUMNS)
            return 2.0 * self._block_rows(tokens) * (into + self._expert_input * (width + DEEP_GEMM_COLUMNS))
        sent = tokens * self._sent(tokens)
        return 2.0 * sent * self.model.expert_weights(self.expert_ranks.split)

    def expert_bytes(self, tokens: int) -> float:
        """Weight bytes of the experts that a step of ``tokens`` tokens touches, all layers; of whole experts
        on the rank with most of them.

        Each token chooses by itself, by the model's ``expert_skew`` or ``expert_loads``.
        """
        model, spread = self.model, self.expert_ranks
        if not model.moe_layers:
            return 0.0
        used = touched(model.experts, model.experts_per_token, tokens, model.expert_skew, model.expert_loads)
        if spread.whole:
            used = most_touched(model.experts, spread.ranks, used / model.experts)
        weights = used * model.expert_weights(spread.split)
        return model.moe_layers * (weights * self._expert_bytes_each)

    def expert_moved_bytes(self, tokens: int) -> float:
        """Bytes of activations that the experts of ``tokens`` tokens read and write, all layers; on the
        fullest rank. In blocks the activation and the quantisation behind it: gate and up are read, their
        product is written, read and written in eight bits. What products move is in their time."""
        model = self.model
        if self.routed_by == "deep_gemm":
            numbers = (model.mlp_products + 1) * model.dtype_bytes + 1
            return self._block_rows(tokens) * self._expert_width * float(numbers)
        width = 2 * self._expert_input + model.mlp_products * self._expert_width
        return tokens * self._sent(tokens) * width * model.dtype_bytes

    @property
    def _expert_input(self) -> int:
        return self.model.expert_input_size or self.model.hidden_size

    @property
    def _expert_width(self) -> float:
        """Columns of an expert on a rank."""
        return self.model.expert_intermediate_size / self.expert_ranks.split

    def _block_rows(self, tokens: int) -> int:
        """Rows that DeepGEMM computes, all layers."""
        model = self.model
        rows = self.expert_ranks.block_rows(model.experts, tokens * model.experts_per_token)
        return model.moe_layers * rows

    def _sent(self, tokens: int) -> float:
        """Experts on the fullest rank that one token is sent to, all layers."""
        model, spread = self.model, self.expert_ranks
        sent = float(model.moe_layers * model.experts_per_token)
        if not spread.whole:
            return sent
        return sent / spread.ranks * self.fullest_rank(tokens)

    def fullest_rank(self, tokens: float) -> float:
        """Tokens of the rank that the others wait for, over the mean: whole experts are unevenly used."""
        model, spread = self.model, self.expert_ranks
        return fullest_rank(
            model.experts,
            model.experts_per_token,
            spread.ranks if spread.whole else 1,
            model.expert_skew,
            tokens,
            loads=model.expert_loads,
            redundant=spread.redundant if spread.rebalanced_every else None,
        )

    # -- LoRA --------------------------------------------------------------------------------------

    @property
    def lora_numbers(self) -> int:
        """Numbers of one adapter of all linear layers: (inputs + outputs) x rank of each matrix, where ranks
        divide what they divide of the matrix."""
        linears = self.model.linears()
        return self.lora_rank * sum(
            count * sum(each.on(self.tensor_parallel_size)) for count, each in linears
        )

    # -- LM head -----------------------------------------------------------------------------------

    def lm_head_flops(self, rows: int) -> float:
        """FLOPs of the logits of ``rows`` sampled tokens."""
        return 2.0 * rows * self.model.hidden_size * self.model.vocab_size / self.tensor_parallel_size

    @property
    def lm_head_bytes(self) -> float:
        """Weight bytes of the LM head, read once a step that samples."""
        model = self.model
        return model.hidden_size * model.vocab_size * model.dtype_bytes / self.tensor_parallel_size

    @cached_property
    def elementwise_bytes_per_token(self) -> float:
        """Bytes a token that the kernels between the matrix products move: each norm reads activation and
        residual and writes both; rotary reads and writes q and k; the activation reads the gate and up halves
        and writes their product; the KV write reads and writes k and v."""
        model, ranks = self.model, self.tensor_parallel_size
        query, key = model.heads // ranks * model.head_dim, model.kv_heads_of(ranks) * model.head_dim
        per_layer = 4 * model.norms_per_layer * model.hidden_size + 2 * (query + key) + 4 * key
        per_layer += 2 * (query + key) if model.qk_norm else 0
        dense = model.dense_layers * model.intermediate_size
        routed = model.moe_layers * model.experts_per_token * model.expert_intermediate_size
        shared = model.moe_layers * model.shared_expert_size
        widths = model.mlp_products * (dense + routed + shared) / ranks
        return (model.layers * per_layer + widths) * model.dtype_bytes

    # -- KV cache ----------------------------------------------------------------------------------

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token more takes in all layers: keys and values, or latents and an indexer's keys. A
        state of fixed size takes none."""
        ranks, each = self.tensor_parallel_size, self.kv_dtype_bytes
        layers = [layer for layer in self.model.cache_layers if layer.kind != "mamba"]
        return sum(layer.count * token_bytes(layer, ranks, each) for layer in layers)


def _kernel(dtype: str, gpu: GPU, model: ModelShape) -> str:
    """How vLLM multiplies weights of a dtype: in their own where the GPU can, else in 16 bits behind Marlin,
    which reads them as they are (fp8 before compute capability 8.9, nvfp4 before 10). Experts of mxfp4 take
    activations of eight bits on compute capability 10, but gpt-oss's, which take 16
    (``_get_priority_backends_for_gpt_oss``)."""
    if dtype in ("fp8", "fp8_block") and not gpu.fp8_flops:
        return "bf16"
    if dtype == "nvfp4" and not gpu.fp4_flops:
        return "int4"
    if dtype == "mxfp4" and gpu.capability[0] == 10 and model.model_type != "gpt_oss":
        return "mxfp4_mxfp8"
    return dtype


def release(version: str) -> tuple[int, int]:
    """(0, 32) of vLLM's "0.32" or "v0.32.1"; InputError if it is no version."""
    try:
        major, minor = version.removeprefix("v").split(".")[:2]
        return int(major), int(minor)
    except ValueError as error:
        raise InputError(
            f"{version!r} is no vLLM version", where="engine.version", fix='Write it as "0.32".'
        ) from error


def cudagraph_capture_sizes(
    max_num_seqs: int,
    max_num_batched_tokens: int,
    *,
    version: str,
    capability: tuple[int, int],
    max_capture_size: int | None = None,
    drafts: tuple[int, ...] = (0,),
) -> tuple[int, ...]:
    """Token counts that vLLM captures CUDA graphs for, rising: 1, 2, 4, then by 8 to 248, then by 16.

    They end at ``max_capture_size`` (``--max-cudagraph-capture-size``), by default twice the tokens of
    max_num_seqs requests and at most 512 (from 0.28 on 1,024 on compute capability 10), and at the token
    budget. The budget itself, and from 0.29 on what max_num_seqs requests compute, are added if they are not
    beyond that end. ``drafts``: that a decoding request has, all that there may be: from 0.29 on, the same
    numbers of requests times 1 + drafts are added, before, all are rounded up to multiples of that.
    """
    since, most = release(version), 1024 if release(version) >= (0, 28) and capability[0] == 10 else 512
    each = 1 + max(drafts)
    usual = min(2 * max_num_seqs * each, most)
    limit = min(usual if max_capture_size is None else max_capture_size, max_num_batched_tokens)
    sizes = {1, 2, 4, *range(8, 256, 8), *range(256, limit + 1, 16), max_num_batched_tokens}
    if since < (0, 29):
        sizes = {-(-size // each) * each for size in sizes if size <= limit}
    elif each == 1:
        sizes.add(max_num_seqs)
    elif max_capture_size is None:
        reached = min(max_num_seqs, most)
        requests = {1, 2, 4, *range(8, min(reached + 1, 256), 8), *range(256, reached + 1, 16), reached}
        sizes |= {count * (1 + more) for count in requests if count <= reached for more in drafts}
    return tuple(sorted(size for size in sizes if size <= limit))


def layers_of_stages(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each pipeline stage: evenly; what is left goes to the stages before the last, from behind
    (vLLM's ``get_pp_indices``)."""
    even, left = divmod(layers, stages)
    return tuple(even + (stages - 1 - left <= place < stages - 1) for place in range(stages))
