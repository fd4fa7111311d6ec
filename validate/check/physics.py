"""Rules that model and GPU set: rooflines of prefill and decode, what a warm cache spares, KV arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from servecast.validate.check.columns import read_name
from servecast.validate.check.finding import (
    Finding,
    asked,
    completion_rate,
    each_row,
    finding,
    latency,
    needed,
)
from servecast.validate.check.table import Hardware, Level, Report

_ALLOWED = 0.9  # of a difference of two bounds
_POOL = 0.25  # how far the estimate of the KV pool may be off
_SPARED = 0.05  # share of a TTFT that a warm cache spares, from which it matters
_WHOLE_RUN_METRICS = ("kv_usage", "running", "waiting", "gpu_memory")


def _bounded(report: Report) -> Iterator[tuple[Level, Hardware]]:
    """The levels of which model and GPU are known."""
    return ((level, level.hardware) for level in report.levels if level.hardware is not None)


@each_row
def roofline_decode(_report: Report, level: Level) -> Iterator[Finding]:
    """A token takes at least one reading of the weights and of its own context."""
    hardware = needed(level.hardware)
    asked(level.of("tpot", "itl", "e2el"))
    least = hardware.roofline_s(decodes=1, context=level.prompt_tokens or 1)
    for value in (*level.of("tpot"), level.get("itl", "mean")):
        if value is None or value.statistic == "std" or value.value == 0 or value.span.high >= least:
            continue
        message = (
            f"{value.metric} {value.statistic} of {1e3 * value.value:.4g} ms, but reading the weights "
            f"once takes {1e3 * least:.4g} ms: tokens came several at a time, or another model or GPU "
            "answered"
        )
        numbers = {"reported_s": value.value, "bound_s": least}
        yield finding(level, [value], message, numbers, certain=True)
    total = level.get("e2el", "mean", "p50")
    if total is None or level.output is None or not level.output.fixed:
        return
    bound = level.output.mean.low * least
    if total.value > 0 and total.span.high < bound:
        message = (
            f"a latency of {total.value:.4g} s for {level.output.mean.mid:.4g} tokens, each of which "
            f"takes {1e3 * least:.4g} ms to read the weights"
        )
        numbers = {"reported_s": total.value, "bound_s": bound}
        yield finding(level, [total], message, numbers, certain=total.statistic == "mean")


@each_row
def roofline_prefill(_report: Report, level: Level) -> Iterator[Finding]:
    """A fresh prompt's first token takes its FLOPs at the peak: what is faster came from a prefix cache."""
    hardware, prompt = needed(level.hardware), needed(level.prompt)
    asked(level.of("ttft"))
    if level.repeated:
        return  # repeated-prompts says it
    tokens = int(prompt.mean.low)
    least = hardware.roofline_s(prompts=1, tokens=tokens)
    for value in level.of("ttft"):
        # the bound is convex in the length, so that of the mean length is one of the mean time
        if value.statistic != "mean" and (not prompt.fixed or value.statistic == "std"):
            continue
        if value.value == 0 or value.span.high >= least:
            continue
        message = (
            f"TTFT {value.statistic} of {1e3 * value.value:.4g} ms, but computing {tokens} fresh tokens "
            f"takes {1e3 * least:.4g} ms at the GPU's peak: a warm prefix cache had them"
        )
        numbers = {"reported_s": value.value, "bound_s": least}
        yield finding(level, [value], message, numbers, certain=value.statistic != "min")
    yield from _burst(level, hardware)


def prefill_difference(report: Report) -> Iterator[Finding]:
    """A longer prompt's first token comes later by what its further tokens take at the peak, at least."""
    lengths = {level.prompt.mean.low for level in report.levels if level.prompt is not None}
    asked(len(lengths) > 1 and any(level.of("ttft") for level, _ in _bounded(report)))
    alike: dict[tuple[object, ...], list[tuple[Level, Hardware]]] = {}
    for level, hardware in _bounded(report):
        if level.prompt is not None and not level.repeated and not level.whole_run:
            others = tuple(
                of for of in level.series if read_name(of.partition("=")[0]).name != "prompt_tokens"
            )
            place = (level.table, others, level.concurrency, level.request_rate)
            alike.setdefault(place, []).append((level, hardware))
    for levels in alike.values():
        for statistic in ("mean", "p50"):
            known = [
                (level.prompt.mean.mid, value, level, hardware)
                for level, hardware in levels
                if level.prompt is not None
                and (value := level.get("ttft", statistic)) is not None
                and value.value > 0
            ]
            known.sort(key=lambda each: each[0])
            for (fewer, before, _, _), (more, after, level, hardware) in pairwise(known):
                low, high = (hardware.roofline_s(prompts=1, tokens=int(tokens)) for tokens in (fewer, more))
                longer = after.span.high - before.span.low
                if int(more) == int(fewer) or longer >= _ALLOWED * (high - low):
                    continue
                message = (
                    f"{more - fewer:.0f} tokens more delay the first one by {1e3 * longer:.4g} ms at most, "
                    f"but computing them takes {1e3 * (high - low):.4g} ms at the GPU's peak: a warm prefix "
                    "cache had them"
                )
                numbers = {"longer_s": longer, "bound_s": high - low, "tokens": more - fewer}
                weight = (high - low) / max(longer, 1e-9)
                yield finding(level, [after], message, numbers, weight=weight)


def _burst(level: Level, hardware: Hardware) -> Iterator[Finding]:
    """A closed loop begins with all slots sending at once: the k-th first token comes after k prefills. Of n
    requests at most k-1 of the first burst and all n-C others are faster."""
    slots, count = level.concurrency, level.num_requests
    tokens = level.prompt_tokens
    if tokens is None or slots is None or count is None or level.open_loop or level.whole_run or slots < 2:
        return
    for value in level.percentiles("ttft"):
        ahead = int((value.rank or 0) / 100 * count - (count - min(slots, count)))
        if ahead < 2:
            continue
        least = hardware.roofline_s(prompts=max(1, ahead // hardware.replicas), tokens=tokens)
        if value.value > 0 and value.span.high < least:
            message = (
                f"TTFT {value.statistic} of {1e3 * value.value:.4g} ms at {slots} requests sent at once, but "
                f"{ahead} prefills of {tokens} fresh tokens take {1e3 * least:.4g} ms at the GPU's peak: a "
                "warm prefix cache had them"
            )
            numbers = {"reported_s": value.value, "bound_s": least, "prompts": float(ahead)}
            yield finding(level, [value], message, numbers)


@each_row
def roofline_throughput(_report: Report, level: Level) -> Iterator[Finding]:
    """Tokens/s times FLOPs a token stay under the peak; a closed loop's streams get one token a step each."""
    hardware, tokens = needed(level.hardware), needed(level.get("output_throughput"))
    if level.whole_run:
        return
    rate, fresh = completion_rate(level), 0.0
    if rate is not None and level.prompt is not None and level.repeated == 0:
        fresh = rate.span.low * level.prompt.mean.low
    whole = hardware.shard.whole
    flops = (whole.linear_flops_per_token + whole.expert_flops(1)) * (tokens.span.low + fresh)
    flops += whole.lm_head_flops(1) * tokens.span.low
    if flops > hardware.flops:
        message = (
            f"{tokens.value:.4g} tokens/s and their prompts are {flops / 1e12:.4g} TFLOP/s, over the "
            f"{hardware.flops / 1e12:.4g} of the GPUs"
        )
        numbers = {"flops": flops, "peak_flops": hardware.flops}
        yield finding(level, [tokens], message, numbers, certain=True)
    most = math.inf if level.concurrency is None else level.concurrency / hardware.roofline_s(decodes=1)
    if tokens.span.low > most:
        message = (
            f"{level.concurrency} streams of one token per reading of the weights are at most {most:.4g} "
            "tokens/s, or several tokens come out of a step"
        )
        yield finding(level, [tokens], message, {"output_tok_s": tokens.value, "bound_tok_s": most})


@each_row
def repeated_prompts(_report: Report, level: Level) -> Iterator[Finding]:
    """Prompts that were sent before are in the prefix cache: the TTFT of such a row is not the cost of its
    prompts, where computing them would have added to it."""
    hardware, repeated = needed(level.hardware), needed(level.repeated)
    if not hardware.prefix_caching or not repeated or level.prompt is None or level.whole_run:
        return
    tokens = int(level.prompt.mean.low)
    together = 1 if level.open_loop else min(level.concurrency or 1, level.num_requests or 1)
    each = max(1, together // hardware.replicas)
    fresh = hardware.roofline_s(prompts=each, tokens=tokens)
    spared = fresh - hardware.roofline_s(prompts=each, tokens=1)
    for value in level.of("ttft"):
        share = 0.5 if value.statistic == "mean" else (value.rank or 100) / 100
        if repeated < share or spared < max(_SPARED * value.value, 2 * value.half):
            continue
        if value.value == 0:
            continue  # zero-latency says it
        if hardware.replicas > 1 and value.value > fresh:
            continue  # another replica may have had them
        message = (
            f"{100 * repeated:.0f} % of the prompts were sent before and are in the prefix cache: "
            f"computing {each} at once would add {1e3 * spared:.3g} ms or more to a TTFT "
            f"{value.statistic} of {1e3 * value.value:.4g} ms"
        )
        numbers = {"repeated": repeated, "reported_s": value.value, "spared_s": spared}
        yield finding(level, [value], message, numbers, weight=spared / value.value)


def kv_arithmetic(report: Report) -> Iterator[Finding]:
    """Requests running x tokens each fill the share of the KV pool that is reported, and fit into it."""
    asked([v for v in report.levels if v.hardware is not None or v.of(*_WHOLE_RUN_METRICS)])
    loads = [level.concurrency for level in report.levels if level.concurrency is not None]
    yield from _weights(report)
    for level in report.levels:
        usage, running, waiting, memory = (level.get(metric, "max", None) for metric in _WHOLE_RUN_METRICS)
        slots = level.concurrency or (max(loads) if loads and level.whole_run else None)
        if usage is not None and usage.span.low > 1.0:
            numbers = {"kv_usage": usage.value}
            yield finding(level, [usage], "more than all of the KV pool is in use", numbers, certain=True)
        for gauge in (running, waiting):
            if gauge is not None and slots is not None and gauge.span.low > slots:
                message = f"{gauge.value:g} requests {gauge.metric}, of {slots} that can be in flight"
                numbers = {gauge.metric: gauge.value, "concurrency": float(slots)}
                yield finding(level, [gauge], message, numbers, certain=True)
        if memory is not None:
            yield from _memory(level)
        yield from _pool(level, slots)


def _weights(report: Report) -> Iterator[Finding]:
    """The weights fit into the GPUs' memory; said once of a model on a GPU."""
    seen: list[Hardware] = []
    for level, hardware in _bounded(report):
        if hardware in seen:
            continue
        seen.append(hardware)
        weights = hardware.shard.weight_bytes
        if weights > hardware.gpu.memory_bytes:
            gib = float(1 << 30)
            message = (
                f"the weights on one GPU are {weights / gib:.1f} GiB, over its "
                f"{hardware.gpu.memory_bytes / gib:.1f}: no KV pool is left"
            )
            numbers = {"weights_gib": weights / gib, "card_gib": hardware.gpu.memory_bytes / gib}
            yield finding(level, level.values.values(), message, numbers, certain=True)


def _pool(level: Level, slots: int | None) -> Iterator[Finding]:
    usage, running = level.get("kv_usage", "max", None), level.get("running", "max", None)
    hardware = level.hardware
    if usage is None or hardware is None or hardware.kv_tokens is None:
        return
    if level.prompt_tokens is None or level.output is None:
        return
    pool = hardware.kv_tokens * hardware.replicas
    held = usage.value * pool
    most = running.value if running is not None else slots
    longest = level.prompt_tokens + level.output.mean.high + 16
    if most is not None and level.output.fixed and (held - usage.half * pool) * (1 - _POOL) > most * longest:
        message = (
            f"a KV pool of {pool} tokens in use to {100 * usage.value:.3g} % is {held:.0f} tokens, but "
            f"{most:g} requests hold {most * longest:.0f} at most"
        )
        numbers = {"held_tokens": held, "most_tokens": most * longest, "pool_tokens": float(pool)}
        yield finding(level, [usage, running], message, numbers)
    shared = bool(level.repeated) and not level.whole_run
    least = (running.value if running is not None else 0) * level.prompt_tokens
    if not shared and hardware.replicas == 1 and least > (held + usage.half * pool) * (1 + _POOL):
        message = (
            f"{running.value if running else 0:g} requests running hold {least:.0f} prompt tokens or more, "
            f"but {100 * usage.value:.3g} % of a KV pool of {pool} tokens are {held:.0f}"
        )
        numbers = {"held_tokens": held, "least_tokens": least, "pool_tokens": float(pool)}
        yield finding(level, [usage, running], message, numbers)


def _memory(level: Level) -> Iterator[Finding]:
    memory, hardware = level.get("gpu_memory", "max", None), level.hardware
    if memory is None or hardware is None:
        return
    weights = hardware.shard.weight_bytes
    expected = hardware.memory_bytes
    beyond = memory.span.low > hardware.gpu.memory_bytes * 1.05 or memory.span.high < weights
    off = expected is not None and abs(memory.value / expected - 1) > _POOL
    if beyond or off:
        gib = float(1 << 30)
        weigh, card, asked = weights / gib, hardware.gpu.memory_bytes / gib, (expected or 0) / gib
        message = f"{memory.value / gib:.1f} GiB in use on a card of {card:.1f}, with weights of {weigh:.1f}"
        numbers = {"gpu_memory_gib": memory.value / gib, "weights_gib": weigh, "card_gib": card}
        if expected is not None:
            message += f", where the flags ask for {asked:.1f}"
            numbers["expected_gib"] = asked
        yield finding(level, [memory], message, numbers, certain=beyond)


@each_row
def kv_capacity(_report: Report, level: Level) -> Iterator[Finding]:
    """Requests in flight that hold more than the KV pool must queue or be preempted, which shows in TTFT."""
    hardware, slots, prompt = needed(level.hardware), needed(level.concurrency), needed(level.prompt)
    first, time = needed(level.get("ttft", "p50")), needed(latency(level))
    free = hardware.gpu.memory_bytes - hardware.shard.weight_bytes
    pool = max(0, free) // hardware.shard.kv_bytes_per_token * hardware.replicas
    held = slots * prompt.mean.low
    if level.repeated or level.open_loop or held <= 2 * pool or first.value > 0.1 * time.span.mid:
        return
    message = (
        f"the prompts of {slots} requests are {held:.0f} tokens, over the {pool} that fit "
        f"beside the weights, yet half of the requests wait only {first.value:.4g} s for their first "
        "token"
    )
    yield finding(level, [first], message, {"held_tokens": held, "pool_tokens": float(pool)})
