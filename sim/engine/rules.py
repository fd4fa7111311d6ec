"""What differs between vLLM releases: each rule once, with the release that changed it and where vLLM has it.

A rule is a named boolean, True in the releases that ``RULE_IN`` says. ``RULES`` is the rule set of each
release, chosen by ``EngineConfig.version``; releases between two changes share theirs.
`servecast validate parity` and `make parity-ladder` hold each against that release's own scheduler.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from servecast.sim.inputs.errors import InputError


@dataclass(frozen=True, slots=True)
class Rules:
    """Scheduling rules that changed between releases. The functions are those of ``vllm/v1/core``.

    Attributes:
        reuse_unhashed_first: freed blocks without a hash go to the head of the free list (LIFO reuse)
            instead of its tail (block_pool.py, BlockPool.free_blocks).
        append_without_caching: with prefix caching off they all go to its tail again (BlockPool.free_blocks:
            "and self.enable_caching").
        count_admitted_lookups: prefix-cache statistics count a look-up once its request is admitted
            (sched/scheduler.py, Scheduler.schedule: record_prefix_cache_stats); before, every look-up of the
            queue's head, also when the admission then fails (KVCacheManager.get_computed_blocks).
        cursor_follows_victim: a priority preemption moves the cursor of the running loop back when the
            victim stands before it (Scheduler.schedule: "victim_index < req_index"); before, only when the
            victim had been scheduled in the same step.
        lone_request_ignores_threshold: ``long_prefill_token_threshold`` does not apply while at most one
            request is running or waiting (Scheduler.schedule: num_eligible_reqs).
        loop_goes_on_after_own_preemption: under the priority policy a running request that preempts itself
            does not end the loop over the running (Scheduler.schedule, where new_blocks is None).
    """

    reuse_unhashed_first: bool
    append_without_caching: bool
    count_admitted_lookups: bool
    cursor_follows_victim: bool
    lone_request_ignores_threshold: bool
    loop_goes_on_after_own_preemption: bool


RELEASES = tuple(f"0.{minor}" for minor in range(20, 34))
"""Those with a rule set, oldest first."""

RULE_IN: dict[str, tuple[str, str | None]] = {
    "reuse_unhashed_first": ("0.24", None),
    "append_without_caching": ("0.27", "0.27"),
    "count_admitted_lookups": ("0.27", None),
    "cursor_follows_victim": ("0.28", None),
    "lone_request_ignores_threshold": ("0.31", None),
    "loop_goes_on_after_own_preemption": ("0.33", None),
}
"""The first and the last release that has a rule; None is the newest."""
OPTION_SINCE = {
    "watermark": "0.24",
    "long_prefill_token_threshold_adaptive": "0.31",
    "max_num_active_seqs": "0.31",
    "prefill_schedule_interval": "0.33",  # before, in the engine core of data-parallel MoE models only
}
"""The first release whose scheduler has an option of ``EngineConfig``; what is not here, all have."""


def minor_release(version: str) -> str:
    """ "0.32" of "0.32.1" or "v0.32.0": patch releases keep the rules of theirs."""
    return ".".join(version.removeprefix("v").split(".")[:2])


def since(version: str, first: str) -> bool:
    """Whether a vLLM version is of the release ``first`` or of a newer one."""
    number, bound = (tuple(int(part) for part in name.split(".")) for name in (minor_release(version), first))
    return number >= bound


def in_force(rules: Mapping[str, tuple[str, str | None]], release: str) -> dict[str, bool]:
    """Which rules a release has, by the first and the last that has each; None is the newest."""
    return {
        name: since(release, first) and (last is None or since(last, release))
        for name, (first, last) in rules.items()
    }


RULES = {release: Rules(**in_force(RULE_IN, release)) for release in RELEASES}


def rules_for(version: str) -> Rules:
    """The rule set of a vLLM version ("0.32", or "0.32.0").

    Raises:
        InputError: there is no rule set for it.
    """
    release = minor_release(version)
    if release not in RULES:
        raise InputError(
            f"no rule set for vLLM {version!r}",
            where="engine.version",
            fix=f"Use one of {', '.join(RULES)}.",
        )
    return RULES[release]


def has_option(release: str, option: str) -> bool:
    """Whether a release of ``RELEASES`` has an option of ``EngineConfig``."""
    return option not in OPTION_SINCE or since(release, OPTION_SINCE[option])


def rule_groups() -> list[tuple[str, ...]]:
    """The releases, oldest first, in groups that share rules and options."""

    def behaviour(release: str) -> tuple[object, ...]:
        return (RULES[release], *(has_option(release, option) for option in OPTION_SINCE))

    return [tuple(group) for _, group in itertools.groupby(RELEASES, key=behaviour)]
