"""Scenarios for the comparison with vLLM's scheduler: requests and aborts at given steps.

Each has a JSON form that replays it exactly. Random ones are drawn from (seed, index).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.draft_rules import draft_rules_for
from servecast.sim.engine.group_rules import group_rules_for
from servecast.sim.engine.kv_groups import CacheSpec, GroupKind, in_flight_tokens, most_blocks
from servecast.sim.engine.pipeline_rules import (
    fills_with_empty_steps,
    loras_of_all_running,
    max_concurrent_batches,
)
from servecast.sim.engine.request import MediaItem, Request
from servecast.sim.engine.rules import RELEASES, has_option
from servecast.sim.engine.speculation import METHODS, Speculation, by_modules, speculation
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import read_text

Pick = Callable[[int, int], int]  # an integer between two, both included; 0 or the lowest is the simplest

MAX_STEPS = 2_000


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request reaches the engine before schedule() call ``step``; ``arrival`` breaks ties of priority."""

    step: int
    arrival: int
    request: Request


@dataclass(frozen=True, slots=True)
class Abort:
    """A client goes away before schedule() call ``step``, or, ``in_flight``, before the complete() that
    follows that call."""

    step: int
    request_id: int
    in_flight: bool


@dataclass(frozen=True, slots=True)
class Grammar:
    """A request's grammar is compiled before schedule() call ``step``."""

    step: int
    request_id: int


@dataclass(frozen=True, slots=True)
class Scenario:
    """What happens to one engine. Arrivals and aborts stand in the order in which they happen. remote: of its
    KV connector ``role``, failure ``policy`` and the ``plans`` of a ``FakeStore``, or None."""

    name: str
    config: EngineConfig
    arrivals: tuple[Arrival, ...]
    aborts: tuple[Abort, ...] = ()
    max_steps: int = MAX_STEPS
    remote: dict[str, Any] | None = None
    grammars: tuple[Grammar, ...] = ()

    @property
    def loop(self) -> dict[str, Any]:
        """What the loop around a scheduler reads beside arrivals and aborts."""
        return {
            "grammars": [dataclasses.asdict(grammar) for grammar in self.grammars],
            "depth": max_concurrent_batches(self.config),
            "fills": self.config.pipeline_parallel_size == 1 or fills_with_empty_steps(self.config.version),
        }

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self) | self.loop)

    @staticmethod
    def from_json(text: str, where: str) -> Scenario:
        """Raises: InputError: the text is not a scenario; ``where`` names its file."""
        try:
            data = json.loads(text)
            return Scenario(
                name=data["name"],
                config=EngineConfig(
                    **data["config"]
                    | {"kv_groups": _groups(data["config"]), "speculation": _speculation(data["config"])}
                ),
                arrivals=tuple(_arrival(**arrival) for arrival in data["arrivals"]),
                aborts=tuple(Abort(**abort) for abort in data["aborts"]),
                max_steps=data["max_steps"],
                grammars=tuple(Grammar(**grammar) for grammar in data.get("grammars", ())),
                remote=data.get("remote"),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"not a parity scenario ({type(error).__name__}: {error})",
                where=where,
                fix="Give a file that `servecast validate parity` wrote.",
            ) from error


def _groups(config: dict[str, Any]) -> tuple[CacheSpec, ...]:
    return tuple(
        CacheSpec(**group | {"shape": tuple(group["shape"])}) for group in config.get("kv_groups", ())
    )


def _speculation(config: dict[str, Any]) -> Speculation | None:
    given: dict[str, Any] | None = config.get("speculation")
    if given is None:
        return None
    given["by_batch"] = [tuple(entry) for entry in given["by_batch"]]
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return Speculation(**fields)


def _arrival(step: int, arrival: int, request: dict[str, Any]) -> Arrival:
    content = tuple((content_id, end) for content_id, end in request.pop("content"))
    media = tuple(MediaItem(*item) for item in request.pop("media", ()))
    return Arrival(step, arrival, Request(**request, content=content, media=media))


def modules_scenarios(version: str, seed: int, count: int) -> Iterator[Scenario]:
    """Those of ``drafted_scenarios`` in which several MTP modules draft."""
    found = (
        draw_drafted(recorded_picks(seed, index)[0], version, f"modules-{version}-{seed}-{index}")
        for index in itertools.count()
    )
    several = (each for each in found if each.config.speculation and each.config.speculation.prompt_lookahead)
    return itertools.islice(several, count)


def drafted_grouped_scenarios(
    version: str,
    seed: int,
    count: int,
    draw: Callable[[Pick, str, str], Scenario] | None = None,
    *,
    states: bool = False,
) -> Iterator[Scenario]:
    """As ``grouped_scenarios``, each with drafts, as far as that is modelled: full and sliding groups, and
    chunked ones where vLLM takes them. draw: instead of ``draw_grouped``. states: each has groups that keep
    states, too."""
    name = f"drafted-{'states' if states else 'grouped'}-{version}-{seed}"
    index = found = 0
    draw = draw or draw_grouped
    while found < count:
        pick = recorded_picks(seed, index)[0]
        drawn = with_drafts(pick, draw(pick, version, f"{name}-{index}"))
        config, index = drawn.config, index + 1
        assert config.speculation is not None
        kinds, drafts = {spec.kind for spec in config.kv_groups}, config.speculation
        if drafts.method == "mtp" and drafts.drops_block and pick(0, 1):
            config = dataclasses.replace(
                config, speculation=dataclasses.replace(drafts, drafter_kinds=(sorted(kinds)[0],))
            )
        beside = {"full", "sliding"} if drafts.drops_block else {"full", "sliding", "chunked"}
        if ("mamba" in kinds) == states and kinds - {"mamba"} <= beside and not drafts.prompt_lookahead:
            groups = tuple(_with_states(spec, drafts) for spec in config.kv_groups)
            more = len(kinds) * -(-drafts.lookahead // config.block_size) * len(config.kv_groups)
            more += sum(spec.drafts for spec in groups)
            config = dataclasses.replace(
                config, kv_groups=groups, num_gpu_blocks=config.num_gpu_blocks + more
            )
            yield dataclasses.replace(drawn, config=config)
            found += 1


def _with_states(spec: CacheSpec, drafts: Speculation) -> CacheSpec:
    """A group with a state for each draft, if it keeps states, and none that a chunk saves inside itself."""
    if spec.kind != "mamba":
        return spec
    return dataclasses.replace(spec, drafts=drafts.num_tokens, checkpoint=0)


def of_kind(
    kind: str, draw: Callable[[Pick, str, str], Scenario]
) -> Callable[[str, int, int], Iterator[Scenario]]:
    """What makes ``count`` random scenarios of a kind, of which number i depends on (version, seed, i)
    alone."""

    def scenarios(version: str, seed: int, count: int) -> Iterator[Scenario]:
        for index in range(count):
            yield draw(recorded_picks(seed, index)[0], version, f"{kind}-{version}-{seed}-{index}")

    return scenarios


def corner_cases(version: str) -> list[Scenario]:
    """Scenarios for what chance hardly ever brings about, made by shrinking a difference that was found."""
    file = Path(__file__).with_name("cases.jsonl")
    cases = [Scenario.from_json(line, str(file)) for line in file.read_text().splitlines()]
    return [case for case in cases if case.config.version == version]


def recorded_picks(seed: int, index: int) -> tuple[Pick, list[int]]:
    """The source of choices of a random scenario, and the list that it records them in."""
    rng = np.random.default_rng([seed, index])
    picks: list[int] = []

    def pick(low: int, high: int) -> int:
        if low < high:
            picks.append(int(rng.integers(low, high, endpoint=True)))
            return picks[-1]
        return low

    return pick, picks


def draw_scenario(pick: Pick, version: str, name: str) -> Scenario:
    """A scenario from choices: every flag and every kind of traffic that the rules speak of.

    Every fourth or so is a crush: many short requests at once on small blocks and a small pool, so that
    they preempt each other all the time. Options are those that the release of ``version`` has.
    """
    has = functools.partial(has_option, version)
    crush = pick(0, 3) == 3
    block_size = (4, 8)[pick(0, 1)] if crush else (16, 16, 8, 4, 32)[pick(0, 4)]
    max_model_len = block_size * pick(4, 40) + (0, 1, block_size - 1)[pick(0, 2)]
    chunked = pick(0, 5) != 5
    small_budget = crush or pick(0, 1) == 1
    budget = pick(16, 4 * max(block_size, 16)) if small_budget else pick(block_size, max_model_len)
    priority = pick(0, 2) >= (1 if crush else 2)
    tied = pick(0, 3) == 3  # arrivals of one step have the same time
    aborting = pick(0, 2) == 2
    shared = _shared_parts(pick, block_size, max_model_len)
    longest_own = 24 if crush else (100, max_model_len)[pick(0, 2) // 2]
    longest_output = (12, 40)[pick(0, 1)] if crush else (40, 200)[pick(0, 1)]

    arrivals: list[Arrival] = []
    aborts: list[Abort] = []
    step = longest = 0
    together = 3 if crush else pick(0, 3)
    while len(arrivals) < 48 and (not arrivals or pick(0, 24) != 0):
        request = Request(
            request_id=len(arrivals),
            arrival_s=0.0,
            **_lengths(pick, shared, max_model_len, longest_own, longest_output),
            priority=pick(0, 3),
        )
        longest = max(longest, min(request.prompt_tokens + request.output_tokens, max_model_len))
        arrivals.append(Arrival(step, step if tied else len(arrivals), request))
        if aborting and pick(0, 2) == 2:
            aborts.append(Abort(step + pick(0, 40), request.request_id, in_flight=pick(0, 1) == 1))
        if pick(0, 3) >= together:
            step += pick(0, 6) if pick(0, 9) else 100 * pick(1, 3)

    needed = -(-longest // block_size)
    blocks = needed + (pick(0, needed // 2) if pick(0, 2) else pick(0, needed if crush else 12 * needed))
    threshold = pick(1, 3 * block_size) if pick(0, 3) >= (2 if crush else 3) else 0
    max_num_seqs = pick(6, 24) if crush else pick(1, 24) if pick(0, 3) else pick(1, 4)
    max_num_seqs = min(max_num_seqs, budget)  # vLLM refuses more
    config = EngineConfig(
        version=version,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget if chunked else max(budget, max_model_len),
        max_model_len=max_model_len,
        num_gpu_blocks=1 + blocks,
        block_size=block_size,
        enable_prefix_caching=pick(0, 6) != 6,
        enable_chunked_prefill=chunked,
        scheduling_policy="priority" if priority else "fcfs",
        async_scheduling=pick(0, 1) == 1,
        scheduler_reserve_full_isl=pick(0, 3) < (2 if crush else 3),
        long_prefill_token_threshold=threshold,
        long_prefill_token_threshold_adaptive=has("long_prefill_token_threshold_adaptive")
        and pick(0, 1) == 1,
        watermark=pick(1, 30) / 100 if has("watermark") and pick(0, 3) == 3 else 0.0,
        max_num_active_seqs=pick(1, max_num_seqs) if has("max_num_active_seqs") and pick(0, 5) == 5 else None,
        prefill_schedule_interval=pick(2, 6) if has("prefill_schedule_interval") and pick(0, 2) == 2 else 1,
    )
    aborts.sort(key=lambda abort: abort.step)
    return Scenario(name, config, tuple(arrivals), tuple(aborts))


def draw_staged(pick: Pick, version: str, name: str) -> Scenario:
    """A random scenario in which something holds requests back: other batches of a pipeline, adapters, or
    grammars that are compiled late."""
    plain = draw_scenario(pick, version, name)
    stages = (1, 2, 2, 3, 4)[pick(0, 4)]
    adapters = pick(1, 6) if stages == 1 or pick(0, 2) == 2 else 0
    # before 0.33 a step of a pipeline may get more adapters than there are slots, and vLLM's engine ends
    slots = adapters if stages > 1 and not loras_of_all_running(version) else pick(1, 4)
    config = dataclasses.replace(
        plain.config,
        pipeline_parallel_size=stages,
        # Model Runner V1 takes no asynchronous steps with stages from 0.31 on
        use_v2_model_runner=stages > 1
        and plain.config.async_scheduling
        and (RELEASES.index(version) >= RELEASES.index("0.31") or pick(0, 1) == 1),
        max_loras=slots if adapters else 0,
    )
    waiting = pick(0, 2) == 2
    arrivals, grammars = [], []
    for arrival in plain.arrivals:
        grammar = int(waiting and pick(0, 2) == 2)
        adapter = pick(0, adapters) if adapters else 0
        if grammar:
            grammars.append(Grammar(arrival.step + pick(0, 12), arrival.request.request_id))
        request = dataclasses.replace(arrival.request, adapter=adapter, grammar=grammar)
        arrivals.append(dataclasses.replace(arrival, request=request))
    grammars.sort(key=lambda grammar: grammar.step)
    return dataclasses.replace(plain, config=config, arrivals=tuple(arrivals), grammars=tuple(grammars))


def draw_shared_out(pick: Pick, version: str, name: str) -> Scenario:
    """A random scenario in which the KV of a sequence is shared out over two ranks or four."""
    plain = draw_scenario(pick, version, name)
    config = dataclasses.replace(plain.config, decode_context_parallel_size=(2, 4)[pick(0, 1)])
    return dataclasses.replace(plain, config=config)


def draw_pictured(pick: Pick, version: str, name: str) -> Scenario:
    """A random scenario whose prompts have images in them, of a few that come again and again, on a small
    encoder budget and cache."""
    plain = draw_scenario(pick, version, name)
    config = plain.config
    whole = pick(0, 2) == 2
    longest = min(3 * config.block_size, config.max_num_batched_tokens)
    if whole and config.long_prefill_token_threshold:  # else no chunk would ever hold it
        longest = min(longest, config.long_prefill_token_threshold)
    images = []
    for number in range(1, 1 + pick(1, 7)):
        length = pick(1, longest)
        lead = pick(0, min(2, length - 1)) if pick(0, 2) == 2 else 0
        tail = pick(0, min(2, length - 1 - lead)) if pick(0, 2) == 2 else 0
        images.append(MediaItem(number, 0, length, lead, tail))
    chosen: dict[int, list[MediaItem]] = {}  # by shared part, what stands in it

    def fill(start: int, end: int) -> list[MediaItem]:
        found = []
        while pick(0, 3):
            image = images[pick(0, len(images) - 1)]
            start += (0, 0, pick(0, 2 * config.block_size))[pick(0, 2)]
            if start + image.length > end:
                break
            found.append(image._replace(offset=start))
            start += image.length
        return found

    arrivals = []
    for arrival in plain.arrivals:
        request, start = arrival.request, 0
        content, shown = list[tuple[int, int]](), list[MediaItem]()
        for part, end in request.content:
            if part not in chosen:
                chosen[part] = fill(start, end)
            if any(item.offset + item.length > end for item in chosen[part]):
                break  # it ends within an image: those tokens are its own
            shown += chosen[part]
            content.append((part, end))
            start = end
        shown += fill(start, request.prompt_tokens)
        request = dataclasses.replace(request, content=tuple(content), media=tuple(shown))
        arrivals.append(dataclasses.replace(arrival, request=request))
    most = max(image.embeds for image in images)
    return dataclasses.replace(
        plain,
        arrivals=tuple(arrivals),
        max_steps=600,
        config=dataclasses.replace(
            config,
            max_num_encoder_input_tokens=most + (0, pick(0, most), pick(0, 8 * most))[pick(0, 2)],
            encoder_cache_size=most + (0, pick(0, most), pick(0, 8 * most))[pick(0, 2)],
            disable_chunked_mm_input=whole,
        ),
    )


def draw_drafted(pick: Pick, version: str, name: str) -> Scenario:
    """A random scenario in which requests draft."""
    return with_drafts(pick, draw_scenario(pick, version, name))


def with_drafts(pick: Pick, plain: Scenario) -> Scenario:
    """A scenario whose requests draft, by one of all methods; how many drafts are accepted is
    ``engine_core.draft_counts``'s."""
    config, version = plain.config, plain.config.version
    rules, age = draft_rules_for(version), RELEASES.index(version)
    methods = [method for method, known in METHODS.items() if RELEASES.index(known.since) <= age]
    method = methods[pick(0, len(methods) - 1)]
    k = pick(1, 5)
    by_batch: list[tuple[int, int]] = []
    if rules.by_batch and pick(0, 3) == 3:
        by_batch = [(1, pick(0, k + 1))]
        while pick(0, 2):
            by_batch.append((by_batch[-1][0] + pick(1, 4), pick(0, k)))
    hidden = METHODS[method].takes_hidden_states
    drafts = speculation(
        version,
        method,
        k,
        (0.5,) * k,
        disable_eagle_block_drop=hidden and rules.disable_eagle_block_drop and pick(0, 4) == 4,
        by_batch=tuple(by_batch),
        seed=pick(0, 1 << 20),
    )
    arrivals: list[Arrival] = []
    for arrival in plain.arrivals:
        request = arrival.request
        if pick(0, 2) == 2:  # one token behind whole blocks: all but this can be a hit
            prompt = (request.prompt_tokens - 1) // config.block_size * config.block_size + 1
            content = tuple((part, min(end, prompt)) for part, end in request.content)
            request = dataclasses.replace(request, prompt_tokens=prompt, content=content)
        arrivals.append(dataclasses.replace(arrival, request=request))
    threshold = config.long_prefill_token_threshold
    slots = drafts.draft_slots * (1 if rules.slots_by_request else config.max_num_seqs)
    if method == "mtp" and k <= config.block_size and pick(0, 2):
        drafts = by_modules(drafts, version, k)
    return dataclasses.replace(
        plain,
        arrivals=tuple(arrivals),
        config=dataclasses.replace(
            config,
            speculation=drafts,
            max_num_batched_tokens=config.max_num_batched_tokens + slots,
            num_gpu_blocks=config.num_gpu_blocks + -(-drafts.lookahead // config.block_size),
            long_prefill_token_threshold=threshold and max(threshold, 1 + k),
        ),
    )


def draw_grouped(pick: Pick, version: str, name: str, *, states: bool = True) -> Scenario:
    """A random scenario whose layers do not all keep the same: one to four groups of two or three kinds,
    with ``states`` some of them of Mamba."""
    plain = draw_scenario(pick, version, name)
    config = plain.config
    groups, retention = _draw_groups(pick, config, states=states)
    longest = max(
        min(a.request.prompt_tokens + a.request.output_tokens, config.max_model_len) for a in plain.arrivals
    )
    in_flight = in_flight_tokens(
        version, config.max_num_batched_tokens, async_scheduling=config.async_scheduling
    )
    needed = sum(most_blocks(spec, longest, in_flight) for spec in groups)
    room = pick(0, needed // 2) if pick(0, 2) else pick(0, 3 * needed)
    return dataclasses.replace(
        plain,
        config=dataclasses.replace(
            config,
            kv_groups=groups,
            block_size=min(spec.block_size for spec in groups),
            num_gpu_blocks=1 + needed + room,
            prefix_cache_retention_interval=retention,
        ),
    )


def _draw_groups(
    pick: Pick, config: EngineConfig, *, states: bool
) -> tuple[tuple[CacheSpec, ...], int | None]:
    """Groups and the retention interval of what they keep for others."""
    block, caching = config.block_size, config.enable_prefix_caching
    made = pick(0, 9 if states else 6)
    rules = group_rules_for(config.version)

    def spec(kind: GroupKind, size: int = block, window: int = 0) -> CacheSpec:
        return CacheSpec(kind=kind, block_size=size, page_bytes=4096 * size, window=window)

    def window() -> int:
        return pick(1, 6 * block)

    interval = pick(0, 4)
    groups = [spec("full")]
    if made < 4:  # sliding windows of one size
        groups += [spec("sliding", window=window())] * pick(1, 3)
        if made == 3 and block > 4:  # of another block size
            sizes = (block * 2, block // 2)
            groups = [groups[0], dataclasses.replace(groups[1], block_size=sizes[pick(0, 1)])]
    elif made == 4:  # of two sizes
        groups += [spec("sliding", window=window()), spec("sliding", window=window())]
    elif made == 5:
        groups = [spec("sliding", window=window())]
    elif made == 6:
        groups += [spec("chunked", window=block * pick(1, 5))]
    else:
        state = CacheSpec(
            kind="mamba",
            block_size=block if caching else config.max_model_len,
            page_bytes=4096 * block,
            mode="align" if caching else "none",
            checkpoint=(0, 1, block)[pick(0, 2)] if rules.registers_boundary_state and caching else 0,
        )
        if caching and rules.splits_freed_windows and pick(0, 1):
            state = dataclasses.replace(state, mode="all")
        groups += [state] * pick(1, 3)
        if made == 9:
            groups.insert(pick(0, 1), spec("sliding", window=window()))
    if pick(0, 1):
        groups.reverse()
    forgets = ("sliding", "mamba") if rules.retains_states else ("sliding",)
    step = math.lcm(*(group.block_size for group in groups))
    retention = (0, None, 0, step, 2 * step)[interval]
    if not any(group.kind in forgets for group in groups):  # vLLM refuses an interval
        retention = 0 if rules.retains_states and retention is not None else None
    return tuple(groups), retention


def _shared_parts(pick: Pick, block_size: int, max_model_len: int) -> list[tuple[tuple[int, int], ...]]:
    """Prompts that others extend: a tree of parts, each path as a request's ``content``."""
    paths: list[tuple[tuple[int, int], ...]] = [()]
    for content_id in range(1, 1 + pick(0, 6)):
        parent = paths[pick(0, len(paths) - 1)]
        start = parent[-1][1] if parent else 0
        tokens = block_size * pick(1, 4) if pick(0, 2) else pick(1, 6 * block_size)
        if start + tokens < max_model_len:
            paths.append((*parent, (content_id, start + tokens)))
    return paths


def _lengths(
    pick: Pick,
    shared: list[tuple[tuple[int, int], ...]],
    max_model_len: int,
    longest_own: int,
    longest_output: int,
) -> dict[str, Any]:
    """Prompt, output and content of a request: a shared path, cut or extended by tokens of its own."""
    path = shared[pick(0, len(shared) - 1)]
    length = path[-1][1] if path else 0
    own = (0, pick(0, 40), pick(0, longest_own))[pick(0, 2)]
    if path and pick(0, 7) == 7:
        own = -pick(0, length - 1)  # ends within a shared part
    prompt = min(max(length + own, 1), max_model_len - 1)
    content = []
    for content_id, end in path:
        content.append((content_id, min(end, prompt)))
        if end >= prompt:
            break
    room = max_model_len - prompt
    max_tokens = min(pick(1, longest_output), room + 3)  # a few run into max_model_len
    output = pick(1, max_tokens) if pick(0, 2) == 2 else max_tokens
    return {
        "prompt_tokens": prompt,
        "output_tokens": output,
        "max_tokens": max_tokens,
        "content": tuple(content),
    }


def read_scenarios(file: Path) -> list[Scenario]:
    """Those of a file, one a line.

    Raises:
        InputError: it cannot be read, or a line is no scenario.
    """
    lines = read_text(file, where=f"--replay {file}", fix="Give a file that exists.").splitlines()
    return [Scenario.from_json(line, f"{file}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


random_scenarios = of_kind("random", draw_scenario)
drafted_scenarios = of_kind("drafted", draw_drafted)
grouped_scenarios = of_kind("grouped", draw_grouped)
pictured_scenarios = of_kind("pictured", draw_pictured)
shared_out_scenarios = of_kind("shared-out", draw_shared_out)
staged_scenarios = of_kind("staged", draw_staged)
