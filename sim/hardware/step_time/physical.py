"""How long one engine step takes: the protocol that every step-time model meets, and the physical model."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import ClassVar, Literal, Protocol

from servecast.sim.engine.engine import StepShape
from servecast.sim.engine.step_costs import StepCosts
from servecast.sim.hardware.expert_ranks import BACKENDS, TOP_K_BYTES
from servecast.sim.hardware.model_shape import KERNELS_DENSE
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.context_parallel import ContextExchange
from servecast.sim.hardware.step_time.mixers import Attention, MixerCosts, mixing_of
from servecast.sim.inputs.errors import InputError

Binding = Literal["compute", "memory_bandwidth", "interconnect", "host"]


class StepTime(Protocol):
    """A step-time model. Never faster than its roofline."""

    def seconds(self, step: StepShape) -> float:
        """Duration of the step in seconds, without noise."""
        ...

    def roofline_seconds(self, step: StepShape) -> float:
        """The least that the step can take on this GPU, in seconds."""
        ...

    def breakdown(self, step: StepShape) -> Mapping[str, float]:
        """Part -> seconds; they add up to ``seconds``."""
        ...

    def binding(self, step: StepShape) -> Binding:
        """What most of the step's time goes to."""
        ...


_PROMPT_TILE = 128  # query rows of a tile of FlashAttention 3 and of Blackwell's kernels
_SAMPLER_BYTES_PER_LOGIT = (
    14  # bf16 logits, fp32 copy, probabilities, noise; slope of the RTX 4090's sampler rows
)
_SAMPLER_KERNELS = 10  # times kernel_s: the floor of the same rows, 25 us


@dataclass(frozen=True, slots=True)
class KernelCosts:
    """Costs of the kinds of kernels, where each was timed (``sim.hardware.gpu_constants``).

    Attributes:
        product_s: floor of a matrix product, s. product_passes: how often its activations, in and out, are
            moved at full bandwidth, a quantisation of the input included.
        attention_s: floor of attention in one layer, KV write included, s. attention_passes: how often q, k,
            v and o of a prompt chunk are moved.
        mixers: of layers that mix tokens otherwise than by grouped-query attention, by their kind.
        expert_compute, expert_bandwidth: shares of the peaks in routed experts, where reading and multiplying
            add up, or join by a smooth maximum of ``expert_overlap``. expert_s: their floor in one layer, s.
            expert_passes: as product_passes.
        all_reduce: one as timed, (bytes, s) rising, in place of ``link`` and ``allreduce_s``.
        all_gather, reduce_scatter: the same, by the bytes of all ranks together. context_gather,
            context_scatter: between the ranks that share KV out.
        exchange_s, exchange_link: floor of a token's way to its experts and back in one layer by DeepEP, s,
            and the share of the link's bandwidth that it reaches; 0: not timed.
    """

    product_s: float
    product_passes: float
    attention_s: float
    attention_passes: float
    expert_compute: float = 1.0
    expert_bandwidth: float = 1.0
    expert_overlap: float = 1.0
    expert_s: float = 0.0
    expert_passes: float = 0.0
    all_reduce: tuple[tuple[int, float], ...] = ()
    all_gather: tuple[tuple[int, float], ...] = ()
    reduce_scatter: tuple[tuple[int, float], ...] = ()
    context_gather: tuple[tuple[int, float], ...] = ()
    context_scatter: tuple[tuple[int, float], ...] = ()
    exchange_s: float = 0.0
    exchange_link: float = 0.0
    mixers: Mapping[str, MixerCosts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if not isinstance(value, int | float):
                continue
            share = entry.name in ("expert_compute", "expert_bandwidth")
            if not (0.0 < value <= 1.0 if share else 0.0 <= value < math.inf):
                rule = "above 0 and at most 1" if share else "0 or more"
                where = f"efficiencies.by_kernel.{entry.name}"
                raise InputError(f"{entry.name} is {value}", where=where, fix=f"Make it {rule}.")


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """What a GPU and an engine make of the datasheet: what is fitted, and what carries over to other models.

    The defaults are typical, for a GPU that nobody measured. "4090" is the public layer-time table of
    Llama-3.1-8B on an RTX 4090 (casys-kaist/LLMServingSim), fitted by
    ``tests/calibrate/fit/test_physical.py``.

    Attributes:
        compute: share of peak FLOP/s in large matrix products. 0.80: an H200 reaches 769-798 of 989 TFLOP/s;
            the 4090 reaches its rated peak (1.0), since it boosts past the rated clock.
        bandwidth: share of memory bandwidth when weights are read. 0.88: the 4090; an H200 copies at 0.90.
        attention_compute: share of peak FLOP/s in attention over prompt chunks. 0.72: the 4090.
        kv_bandwidth: share of memory bandwidth when decodes read KV. 0.90: the 4090.
        overlap_exponent: p of the smooth maximum (a^p + b^p)^(1/p) of compute and memory time in matrix
            products; infinite would be a sharp roofline, 1 no overlap. 2.26: the 4090, 1 to 2,048 tokens
            evenly in log (2.0 to 2.4 depending on the layer and the range).
        kernel_s: launch, ramp-up and tail of one GPU kernel, s. 1.8e-6: the 4090's small kernels of a layer
            take 18 us at one token, over ten kernels a layer.
        attention_seq_s: attention's fixed work per decode and layer, s. 0.2e-6: the 4090.
        host_fixed_s: time per step that the GPU waits for the host, s. 0.3e-3: assumed, async scheduling.
        host_per_seq_s: the same per scheduled request, s. 5e-6: assumed.
        link: share of the link's bandwidth in large all-reduces. 0.8: assumed.
        allreduce_s: latency of one small all-reduce, s. 10e-6: assumed, NVLink; more over PCIe.
        eager_layer_s: time that the host takes to launch the kernels of a plain dense layer where no CUDA
            graph does, s: a step of more tokens than the largest graph is never shorter than that for all
            kernels. 0: not bound by it.
        by_kernel: what the kinds of kernels cost beyond that, where they were timed one by one.
    """

    compute: float = 0.80
    bandwidth: float = 0.88
    attention_compute: float = 0.72
    kv_bandwidth: float = 0.90
    overlap_exponent: float = 2.26
    kernel_s: float = 1.8e-6
    attention_seq_s: float = 0.2e-6
    host_fixed_s: float = 0.3e-3
    host_per_seq_s: float = 5e-6
    link: float = 0.8
    allreduce_s: float = 10e-6
    eager_layer_s: float = 0.0
    by_kernel: KernelCosts | None = None

    SHARES: ClassVar[tuple[str, ...]] = ("compute", "bandwidth", "attention_compute", "kv_bandwidth", "link")

    def __post_init__(self) -> None:
        for name in self.parameters():
            value = getattr(self, name)
            if name in self.SHARES:
                good, rule = 0.0 < value <= 1.0, "above 0 and at most 1: nothing beats the datasheet"
            elif name == "overlap_exponent":
                good, rule = 1.0 <= value < math.inf, "at least 1"
            else:
                good, rule = 0.0 <= value < math.inf, "0 or more seconds"
            if not good:
                raise InputError(f"{name} is {value}", where=f"efficiencies.{name}", fix=f"Make it {rule}.")

    @classmethod
    def parameters(cls) -> tuple[str, ...]:
        """The names of the numbers that a fit may tell: all but ``by_kernel``."""
        return tuple(each.name for each in fields(cls) if each.name != "by_kernel")

    def mixer(self, kind: str) -> MixerCosts:
        """Costs of layers that mix tokens in that way; those of attention where theirs were not timed."""
        costs = self.by_kernel
        if costs is not None and kind in costs.mixers:
            return costs.mixers[kind]
        return MixerCosts(
            prompt_compute=self.attention_compute,
            compute=self.attention_compute,
            bandwidth=self.kv_bandwidth,
            sequence_s=self.attention_seq_s,
            passes=0.0 if costs is None else costs.attention_passes,
            floor_s=0.0 if costs is None else costs.attention_s,
        )


def smooth_maximum(first: float, second: float, exponent: float) -> float:
    """(a^p + b^p)^(1/p), written so that rounding cannot bring it under max(a, b)."""
    high, low = (first, second) if first >= second else (second, first)
    return high * (1.0 + (low / high) ** exponent) ** (1.0 / exponent) if high else 0.0


class PhysicalStepTime:
    """Step time from FLOPs, bytes and the datasheet, times a few efficiencies.

    ``seconds`` is a sum of parts, each at least its FLOPs over the peak and at least its bytes over the
    bandwidth, so the sum is never under ``roofline_seconds``:

    - host: fixed and per request, and what the GPU waits for launches outside CUDA graphs; kernels: a fixed
      cost each
    - linear: weights read once against 2 FLOPs a weight and token, joined by a smooth maximum
    - elementwise: norms, rotary, activation and KV write, by bytes
    - attention_prefill: for each kind of layer FLOPs of all chunks, or reading their older KV, or the chunk
      with the longest context on the few thread blocks it fills (one a head and tile of query rows),
      whichever is longest; states that are read and written
    - attention_decode: KV or states read, and a fixed cost per decode and layer. Beside prompt chunks,
      FlashAttention 2 (compute capability 8 and 12) pads the one query row of a decode to a tile, which costs
      a tile's FLOPs. Windows hold back what is read
    - lm_head, sampler: by sampled row
    - all_reduce: two a layer, a small one more where q and k are normed over all heads together, and the
      gathered logits, under tensor parallelism
    - experts, all_to_all: where engine cores share the layers of experts, those on the tokens of all cores,
      and the exchange before and behind each; one step's own time takes all cores to compute as many tokens
    - rebalancing: EPLB's moves, spread over the steps between them
    - context_parallel: what ranks exchange that share KV out (``ContextExchange``)

    Tokens are padded up to the next CUDA-graph size while there is one, as vLLM pads pure decode steps (full
    graphs) and mixed ones (piecewise graphs).

    Args:
        shard: one rank; the time is a rank's. efficiencies: what is reached of its GPU's peaks.
        slots: tokens that a request has more than a step says. greedy: tokens are not sampled, but the
            likeliest taken. Both are of drafters.

    Raises:
        InputError: there are several ranks, and nothing says how fast the link between them is.
    """

    def __init__(
        self,
        shard: Shard,
        efficiencies: Efficiencies | None = None,
        *,
        slots: int = 0,
        greedy: bool = False,
    ) -> None:
        self._slots, self._greedy = slots, greedy
        self.shard, self._ranks = shard, shard.tensor_parallel_size
        self._spread = spread = shard.expert_ranks
        self._model, self._gpu = model, gpu = shard.model, shard.gpu
        self._link = gpu.link_bandwidth
        if (spread.ranks > 1 or shard.stage[1] > 1) and self._link is None:
            raise InputError(
                f"nothing says how fast the link between two {gpu.name} is",
                where="gpu: link_bandwidth",
                fix="Give it in the GPU's file, in bytes/s each way, or use one rank.",
            )
        self.efficiencies = eff = efficiencies or Efficiencies()
        self._dense_flops = shard.linear_flops_per_token
        self._mixing = mixing_of(shard, [eff.mixer(mixer.kind) for mixer in model.layer_kinds])
        self._kernels_s = model.kernels * eff.kernel_s
        costs = eff.by_kernel
        if costs is not None:
            floors = self._mixing.floor_s + model.products * costs.product_s
            floors += model.moe_layers * costs.expert_s
            self._kernels_s = floors + model.small_kernels * eff.kernel_s
        self._graphed = shard.cudagraph_sizes[-1] if shard.cudagraph_sizes else 0  # most tokens in a graph
        self._eager_s = model.kernels / KERNELS_DENSE * eff.eager_layer_s
        self._by_tokens: dict[int, float] = {}
        self._by_padded: dict[int, float] = {}
        self._by_rows: dict[int, float] = {}
        self._by_cores: dict[tuple[int, int], float] = {}
        self._context = ContextExchange.of(shard)
        if self._context is not None and self._context.older:
            gather = costs.context_gather if costs is not None else ()
            large = (1 << 20) * self._context.older  # they come in large pieces, whose latency does not count
            both = (self._collective(gather, size, shard.context_ranks) for size in (2 * large, large))
            older_s = (next(both) - next(both)) / (1 << 20)
            expanding = (replace(each, expand_s=each.expand_s + older_s) for each in self._mixing.attention)
            self._mixing = replace(self._mixing, attention=tuple(expanding))

    def seconds(self, step: StepShape) -> float:
        """Duration of the step in seconds. A step with nothing in it takes no time."""
        decodes, chunks = step.decodes, step.chunks
        drafts: int = getattr(step, "drafts", 0)
        requests, tokens = decodes, decodes + drafts
        total = 0.0
        if chunks:
            requests += len(chunks)
            for chunk in chunks:
                tokens += chunk[0]
            total = self._attention_prefill(chunks)
        elif not decodes:
            return 0.0
        if decodes:
            total += self._attention_decode(step)
        tokens += self._slots * requests
        uniform = tokens > requests and not chunks
        by_tokens = self._uniform_seconds(tokens, requests) if uniform else self._tokens_seconds(tokens)
        by_rows = self._rows_seconds(step.samples)
        total += by_tokens + by_rows + requests * self.efficiencies.host_per_seq_s
        total += self._lora(step)
        if self._context is not None:
            total += self._context_seconds(self._context.tokens(chunks, decodes))
        return total if tokens <= self._graphed or total > self._eager_s else self._eager_s

    def costs(self) -> StepCosts:
        """The same for the engine's core, which adds up ``seconds`` by itself."""
        mixing = self._mixing
        window, chunked = mixing.window
        numbers = {
            "attention": [
                (
                    *(each.layers, each.window, each.pair_s, each.read_s, each.expand_s),
                    *(each.decode_s(mixed=False), each.decode_s(mixed=True), each.block_s),
                    *(each.decode_pair_s, float(each.rows), *each.least),
                )
                for each in mixing.attention
            ],
            "window": window,
            "chunked": chunked,
            "decode_s": mixing.decode_s,
            "chunk_token_s": mixing.chunk_token_s,
            "chunk_s": mixing.chunk_s,
            "serial_s": mixing.serial_s,
            "request_s": self.efficiencies.host_per_seq_s,
            "eager_s": self._eager_s,
            "graphed": self._graphed,
            "lora": self._lora_costs,
            "prompt_tile": _PROMPT_TILE if self.efficiencies.by_kernel is not None else 1,
            "slots": self._slots,
            "exchange": None if self._context is None else self._context_seconds,
            "exchanges_decodes": self._context is None or self._context.decodes_only,
            "least": (self._least_of_tokens, self._least_of_rows, self._gpu.bandwidth),
        }
        by_tokens = self._tokens_seconds if self._spread.data == 1 else self._own_seconds
        return StepCosts(numbers, by_tokens, self._rows_seconds, self._uniform_seconds)

    def in_lockstep(self, tokens: Sequence[int]) -> tuple[list[int], float, bool]:
        """What engine cores that share the layers of experts make of a common step.

        Args:
            tokens: of each core.

        Returns:
            What each computes: if there is a graph for all of them, they all run that of the largest, else
            none does (``dp_utils._synchronize_dp_ranks``), and releases of ``padded_alike`` pad all to the
            largest nevertheless. Seconds of the layers of experts, and whether there was a graph.
        """
        graphed = max(tokens) <= self._graphed
        alike = graphed or (self._graphed > 0 and self._spread.padded_alike)
        computed = [self.shard.padded(max(tokens))] * len(tokens) if alike else list(tokens)
        key = sum(computed), max(computed)
        seconds = self._by_cores.get(key)
        if seconds is None:
            seconds = self._by_cores[key] = sum(self._shared_parts(*key).values())
        return computed, seconds, graphed

    def breakdown(self, step: StepShape) -> dict[str, float]:
        """Part -> seconds; they add up to ``seconds``."""
        tokens, requests, padded = self._count(step)
        if not tokens:
            return {}
        parts = self._token_parts(padded)
        parts["host"] += requests * self.efficiencies.host_per_seq_s
        parts["attention_prefill"] = self._attention_prefill(step.chunks)
        parts["attention_decode"] = self._attention_decode(step) if step.decodes else 0.0
        for name, seconds in self._row_parts(step.samples).items():
            parts[name] = parts.get(name, 0.0) + seconds
        if lora := self._lora(step):
            parts["lora"] = lora
        if self._context is not None:
            exchanged = self._context.tokens(step.chunks, step.decodes)
            parts["context_parallel"] = self._context_seconds(exchanged)
        if tokens > self._graphed:
            parts["host"] += max(0.0, self._eager_s - sum(parts.values()))
        return parts

    def binding(self, step: StepShape) -> Binding:
        """What most of the step's time goes to; a part counts for the larger of its two sides."""
        parts = self.breakdown(step)
        if not parts:
            return "host"
        seen = [(each, each.layers * seen) for each, seen in self._seen(step)]
        mixed, queries = bool(step.chunks), _queries(step)
        sides: dict[str, tuple[float, float]] = {  # compute, memory
            "linear": self._linear_sides(self._count(step)[2]),
            "experts": self._expert_sides(self._spread.data * self._count(step)[2]),
            "lm_head": self._lm_head_sides(step.samples),
            "attention_prefill": (1.0, 0.0),
            "attention_decode": (
                sum(tokens * each.decode_s(mixed=mixed, queries=queries) for each, tokens in seen),
                sum(tokens * each.read_s for each, tokens in seen),
            ),
            "elementwise": (0.0, 1.0),
            "lora": (0.0, 1.0),
            "sampler": (0.0, 1.0),
        }
        spent: dict[Binding, float] = {
            "compute": 0.0,
            "memory_bandwidth": 0.0,
            "interconnect": 0.0,
            "host": 0.0,
        }
        for name, seconds in parts.items():
            if name in sides:
                compute, memory = sides[name]
                spent["compute" if compute > memory else "memory_bandwidth"] += seconds
            else:
                linked = name in ("all_reduce", "all_to_all", "context_parallel")
                spent["interconnect" if linked else "host"] += seconds
        return max(spent, key=lambda side: spent[side])

    def roofline_seconds(self, step: StepShape) -> float:
        """What no kernel can beat on this GPU: all FLOPs at the peak, or all weights and older KV read once
        at full bandwidth, whichever is longer. Activations may stay in caches and do not count, nor does
        padding. With experts, the weights read are an expectation."""
        tokens = step.decodes + getattr(step, "drafts", 0) + sum(new for new, _ in step.chunks)
        if not tokens:
            return 0.0
        queries = _queries(step)
        compute, read = self._least_of_tokens(tokens)
        logits, read_rows = self._least_of_rows(step.samples)
        compute += logits
        memory = (read + read_rows) / self._gpu.bandwidth
        for each, seen in self._seen(step):
            pair_s, decode_pair_s, read_s = each.least
            compute += each.layers * seen * decode_pair_s * queries
            memory += each.layers * seen * read_s
            for new, context in step.chunks:
                compute += each.layers * each.pairs(new, context) * pair_s
                memory += each.layers * each.before(context) * read_s
        return max(compute, memory)

    def _least_of_tokens(self, tokens: int) -> tuple[float, float]:
        """What ``roofline_seconds`` counts for tokens: seconds of compute, bytes of weights."""
        shard = self.shard
        experts = float(self._model.moe_layers * self._model.experts_per_token)
        experts *= 2 * self._model.expert_weights(1) / self._ranks
        compute = tokens * self._dense_flops / shard.linear_peak + tokens * experts / shard.expert_peak
        return compute, shard.linear_bytes(tokens)

    def _least_of_rows(self, rows: int) -> tuple[float, float]:
        """The same of sampled rows; without an LM head nothing."""
        if not rows or not self.shard.samples:
            return 0.0, 0.0
        return self.shard.lm_head_flops(rows) / self._gpu.bf16_flops, self.shard.lm_head_bytes

    # -- parts -------------------------------------------------------------------------------------

    def _tokens_seconds(self, tokens: int) -> float:
        seconds = self._by_tokens.get(tokens)
        if seconds is None:
            seconds = self._by_tokens[tokens] = self._padded_seconds(self.shard.padded(tokens))
        return seconds

    def _uniform_seconds(self, tokens: int, requests: int) -> float:
        """Of a batch of requests that have equally many tokens."""
        return self._padded_seconds(self.shard.padded(tokens, requests))

    def _padded_seconds(self, padded: int) -> float:
        seconds = self._by_padded.get(padded)
        if seconds is None:
            seconds = self._by_padded[padded] = sum(self._token_parts(padded).values())
        return seconds

    def _rows_seconds(self, rows: int) -> float:
        seconds = self._by_rows.get(rows)
        if seconds is None:
            seconds = self._by_rows[rows] = sum(self._row_parts(rows).values())
        return seconds

    def _own_seconds(self, computed: int) -> float:
        return sum(self._own_parts(computed).values())

    def _linear(self, tokens: int) -> float:
        """Seconds of the linear layers; without the experts where cores share them."""
        eff, shard, costs = self.efficiencies, self.shard, self.efficiencies.by_kernel
        if costs is None:
            return smooth_maximum(*self._linear_sides(tokens), eff.overlap_exponent)
        bandwidth, read = self._gpu.bandwidth, shard.expert_bytes(tokens)
        compute = tokens * self._dense_flops / (shard.linear_peak * eff.compute)
        memory = (shard.linear_bytes(tokens) - read) / (bandwidth * eff.bandwidth)
        dense = smooth_maximum(compute, memory, eff.overlap_exponent)
        dense += tokens * shard.product_bytes_per_token * costs.product_passes / bandwidth
        return dense if self._spread.data > 1 else sum(self._expert_terms(tokens, costs), dense)

    def _experts(self, tokens: int) -> float:
        """Seconds of the routed experts on so many tokens of all cores together, floors left out."""
        eff, costs = self.efficiencies, self.efficiencies.by_kernel
        if costs is None:
            return smooth_maximum(*self._expert_sides(tokens), eff.overlap_exponent)
        return sum(self._expert_terms(tokens, costs))

    def _expert_terms(self, tokens: int, costs: KernelCosts) -> tuple[float, float]:
        """Multiplying and reading; moving activations."""
        shard, bandwidth = self.shard, self._gpu.bandwidth
        compute = shard.expert_flops(tokens) / (shard.expert_peak * costs.expert_compute)
        read = shard.expert_bytes(tokens) / (bandwidth * costs.expert_bandwidth)
        overlap = costs.expert_overlap
        experts = compute + read if overlap == 1.0 else smooth_maximum(compute, read, overlap)
        return experts, shard.expert_moved_bytes(tokens) * costs.expert_passes / bandwidth

    def _expert_sides(self, tokens: int) -> tuple[float, float]:
        """Compute and memory time of the routed experts, s."""
        eff, shard = self.efficiencies, self.shard
        compute = shard.expert_flops(tokens) / (shard.expert_peak * eff.compute)
        return compute, shard.expert_bytes(tokens) / (self._gpu.bandwidth * eff.bandwidth)

    def _linear_sides(self, tokens: int) -> tuple[float, float]:
        """Compute and memory time of the linear layers, s; without the experts where cores share them."""
        eff, shard = self.efficiencies, self.shard
        compute = tokens * self._dense_flops / (shard.linear_peak * eff.compute)
        read = shard.linear_bytes(tokens)
        if self._spread.data == 1:
            compute += shard.expert_flops(tokens) / (shard.expert_peak * eff.compute)
        else:
            read -= shard.expert_bytes(tokens)
        return compute, read / (self._gpu.bandwidth * eff.bandwidth)

    def _shared_parts(self, tokens: int, largest: int) -> dict[str, float]:
        """Parts of the layers of experts that cores share: ``tokens`` of all of them, at most ``largest`` of
        one."""
        return {"experts": self._experts(tokens), "all_to_all": self._exchange(tokens, largest)}

    def _exchange(self, tokens: int, largest: int) -> float:
        """Seconds that tokens take to their experts and back, all layers.

        allgather_reducescatter: every rank gets all tokens, quantised as the experts want them, with their
        top-k weights and ids, and sends back sums. DeepEP: to the ranks of its experts, by the rank with
        most tokens, as timed: its bytes, in 16 bits both ways.
        """
        model, shard, spread = self._model, self.shard, self._spread
        hidden, chosen = model.expert_input_size or model.hidden_size, model.experts_per_token
        costs, ranks = self.efficiencies.by_kernel, spread.exchanging
        if spread.backend == BACKENDS[0]:
            there = tokens * (hidden * shard.dispatched_bytes + chosen * TOP_K_BYTES)
            back = tokens * hidden * model.dtype_bytes
            gather, scatter = (costs.all_gather, costs.reduce_scatter) if costs is not None else ((), ())
            return model.moe_layers * (
                self._collective(gather, there, ranks) + self._collective(scatter, back, ranks)
            )
        if costs is None or not costs.exchange_link:
            raise InputError(
                f"nothing is known of the times of {spread.backend} on a {self._gpu.name}",
                where="engine.all2all_backend",
                fix=f"Use {BACKENDS[0]}, or profile: kernels on a GPU whose timings have it.",
            )
        sent = largest / (spread.tensor if spread.sequence_parallel else 1) * chosen * hidden * 2
        assert self._link is not None
        passed = 2 * sent * (ranks - 1) / ranks / (self._link * costs.exchange_link)
        return model.moe_layers * (costs.exchange_s + passed)

    def _collective(self, timed: tuple[tuple[int, float], ...], size: float, ranks: int) -> float:
        """One all-gather or reduce-scatter of so many bytes of all ranks: as timed, or in a ring."""
        if timed:
            return _between(timed, int(size))
        assert self._link is not None
        sent = (ranks - 1) / ranks * size
        return self.efficiencies.allreduce_s + sent / (self._link * self.efficiencies.link)

    @property
    def link(self) -> float | None:
        """Bytes/s of the link between two GPUs, each way; None if nothing says it."""
        return self._link

    def gathered(self, size: int) -> float:
        """Seconds in which tensor-parallel ranks gather so many bytes of which each has a part."""
        costs = self.efficiencies.by_kernel
        return self._collective(costs.all_gather if costs is not None else (), size, self._ranks)

    def _context_seconds(self, tokens: int) -> float:
        """Seconds of the exchange between ranks that share KV out, all layers: queries are gathered; then
        log-sum-exps, and outputs are scattered, or both in one message to each."""
        each, eff, shard = self._context, self.efficiencies, self.shard
        if each is None or not tokens:
            return 0.0
        costs, ranks = eff.by_kernel, shard.context_ranks
        gather, scatter = (costs.context_gather, costs.context_scatter) if costs is not None else ((), ())
        layer = self._collective(gather, tokens * each.query, ranks) + each.kernels * eff.kernel_s
        if shard.context_backend == "a2a":
            layer += self._collective(scatter, tokens * (each.output + each.sums / ranks), ranks)
        else:
            layer += self._collective(gather, tokens * each.sums, ranks)
            layer += self._collective(scatter, tokens * each.output, ranks)
        if each.again and costs is not None:
            layer += costs.attention_s
        return self._model.layers * layer

    def _lora(self, step: StepShape) -> float:
        """Seconds of the adapters of a step, if it has any."""
        adapters = getattr(step, "adapters", None)
        if not adapters:
            return 0.0
        fixed, adapter_s, token_s = self._lora_costs
        seconds: float = fixed + len(adapters) * adapter_s + sum(adapters.values()) * token_s
        return seconds

    @cached_property
    def _lora_costs(self) -> tuple[float, float, float]:
        """Seconds of a step with adapters, of each of them, and of each of their tokens: two kernels
        (``lora_shrink``, ``lora_expand``) for each group of matrices that share their input, an adapter's
        numbers read once, and two FLOPs a number and token."""
        eff, shard = self.efficiencies, self.shard
        numbers = shard.lora_numbers
        read = numbers * self._model.dtype_bytes / (self._gpu.bandwidth * eff.bandwidth)
        flops = 2.0 * numbers / (self._gpu.bf16_flops * eff.compute)
        return 2 * self._model.products * eff.kernel_s, read, flops

    def _rebalancing(self) -> float:
        """EPLB moves at most all experts of a rank, spread over the steps between two moves: over the link
        while nothing else runs, or behind the steps, whose bandwidth the copies take in and out of."""
        spread, shard = self._spread, self.shard
        if not spread.rebalanced_every:
            return 0.0
        moved = shard.held_expert_bytes
        if spread.rebalanced_behind:
            return 2 * moved / self._gpu.bandwidth / spread.rebalanced_every
        assert self._link is not None
        return moved / (self._link * self.efficiencies.link) / spread.rebalanced_every

    def _lm_head_sides(self, rows: int) -> tuple[float, float]:
        if not rows:
            return 0.0, 0.0
        eff = self.efficiencies
        compute = self.shard.lm_head_flops(rows) / (self._gpu.bf16_flops * eff.compute)
        return compute, self.shard.lm_head_bytes / (self._gpu.bandwidth * eff.bandwidth)

    def _token_parts(self, padded: int) -> dict[str, float]:
        """Parts that the number of tokens decides, padding included, the host's fixed time among them."""
        parts, cores = self._own_parts(padded), self._spread.data
        return parts if cores == 1 else parts | self._shared_parts(cores * padded, padded)

    def _own_parts(self, computed: int) -> dict[str, float]:
        """The same of one core, by the tokens that it computes, padding among them."""
        model, eff = self._model, self.efficiencies
        moved = computed * self.shard.elementwise_bytes_per_token
        parts = {
            "host": eff.host_fixed_s,
            "kernels": self._kernels_s,
            "linear": self._linear(computed),
            "elementwise": moved / (self._gpu.bandwidth * eff.bandwidth),
        }
        if self._spread.rebalanced_every:
            parts["rebalancing"] = self._rebalancing()
        if self._ranks > 1:
            size = computed * model.hidden_size * model.dtype_bytes
            layer = 2 * self._all_reduce(size)
            if model.qk_norm_over_ranks:  # MiniMaxText01RMSNormTP.forward_qk: two fp32 sums a token
                layer += self._all_reduce(computed * 8)
            parts["all_reduce"] = model.layers * layer
            if self._spread.sequence_parallel:  # the second only gathers, half of an all-reduce's bytes
                more = self._all_reduce(size) - self._all_reduce(size // 2)
                parts["all_reduce"] -= model.moe_layers * more
        return parts

    def _row_parts(self, rows: int) -> dict[str, float]:
        """Parts that the number of sampled rows decides."""
        if not rows or not self.shard.samples:
            return {}
        model, eff = self._model, self.efficiencies
        logits = rows * model.vocab_size
        each = model.dtype_bytes if self._greedy else _SAMPLER_BYTES_PER_LOGIT
        sampler = logits * each / (self._gpu.bandwidth * eff.bandwidth)
        parts = {
            "lm_head": smooth_maximum(*self._lm_head_sides(rows), eff.overlap_exponent),
            "sampler": (1 if self._greedy else _SAMPLER_KERNELS) * eff.kernel_s + sampler,
        }
        if self._ranks > 1:  # an all-gather moves half of what an all-reduce of the same result does
            parts["all_reduce"] = self._all_reduce(logits * model.dtype_bytes // 2)
        return parts

    def _all_reduce(self, size: int) -> float:
        """One all-reduce of that many bytes: as timed, or in a ring, where each rank sends 2 (n-1)/n of
        them."""
        if self._link is None:
            return 0.0
        costs = self.efficiencies.by_kernel
        if costs is not None and costs.all_reduce:
            return _between(costs.all_reduce, size)
        sent = 2 * (self._ranks - 1) / self._ranks * size
        return self.efficiencies.allreduce_s + sent / (self._link * self.efficiencies.link)

    def _attention_prefill(self, chunks: Sequence[tuple[int, int]]) -> float:
        if not chunks:
            return 0.0
        mixing, tiled = self._mixing, self.efficiencies.by_kernel is not None
        total = 0.0
        for tokens, _ in chunks:
            total += tokens * mixing.chunk_token_s
        total += len(chunks) * mixing.chunk_s + max(tokens for tokens, _ in chunks) * mixing.serial_s
        longest = max(context for _, context in chunks)
        for each in mixing.attention:
            pairs = older = 0
            for tokens, context in chunks:
                pairs += each.pairs(-(-tokens // _PROMPT_TILE) * _PROMPT_TILE if tiled else tokens, context)
                older += each.before(context)
            compute, read = each.layers * pairs * each.pair_s, each.layers * older * each.read_s
            total += max(compute, read, each.before(longest) * each.block_s)
            total += each.layers * older * each.expand_s
        return total

    def _seen(self, step: StepShape) -> list[tuple[Attention, int]]:
        """Each kind of attention with the KV tokens that the step's decodes attend to in one layer."""
        windowed = getattr(step, "decode_windowed", None) if self._mixing.window[0] else None
        return [
            (each, each.seen(step.decode_context, step.decodes, windowed)) for each in self._mixing.attention
        ]

    def _attention_decode(self, step: StepShape) -> float:
        total, mixed, queries = step.decodes * self._mixing.decode_s, bool(step.chunks), _queries(step)
        for each, seen in self._seen(step):
            total += each.layers * seen * each.decode_s(mixed=mixed, queries=queries)
        return total

    def _count(self, step: StepShape) -> tuple[int, int, int]:
        """Tokens and requests of a step, and its tokens padded to a CUDA graph's."""
        requests = step.decodes + len(step.chunks)
        tokens = step.decodes + getattr(step, "drafts", 0) + sum(new for new, _ in step.chunks)
        tokens += self._slots * requests
        uniform = requests if tokens > requests and not step.chunks else 0
        return tokens, requests, self.shard.padded(tokens, uniform)


def _between(points: Sequence[tuple[int, float]], at: int) -> float:
    """Linear between (size, seconds) of rising sizes, and beyond the last as between the last two."""
    right = min(max(bisect_left(points, (at, 0.0)), 1), len(points) - 1)
    (low, before), (high, after) = points[right - 1], points[right]
    return max(points[0][1] if at < low else 0.0, before + (after - before) * (at - low) / (high - low))


def _queries(step: StepShape) -> float:
    """Tokens that a decoding request computes, on average: one and its drafts."""
    drafts: int = getattr(step, "drafts", 0)
    return 1.0 + drafts / step.decodes if drafts else 1.0
