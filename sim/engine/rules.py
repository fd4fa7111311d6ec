"""What differs between vLLM versions: one rule set per version, chosen by ``EngineConfig.version``."""

from __future__ import annotations

from dataclasses import dataclass

from servecast.sim.inputs.errors import InputError


@dataclass(frozen=True, slots=True)
class Rules:
    """Scheduling rules that changed between releases.

    Attributes:
        reuse_unhashed_first: freed blocks without a hash go to the head of the free list (LIFO reuse)
            instead of its tail.
        lone_request_ignores_threshold: ``long_prefill_token_threshold`` does not apply while at most one
            request is running or waiting.
        cursor_follows_victim: a priority preemption moves the cursor of the running loop back when the
            victim stands before it; before, only when the victim had been scheduled in the same step.
        count_failed_lookups: prefix-cache statistics count every look-up of the queue's head, also when
            the admission then fails.
    """

    reuse_unhashed_first: bool
    lone_request_ignores_threshold: bool
    cursor_follows_victim: bool
    count_failed_lookups: bool


RULES = {
    "0.23": Rules(
        reuse_unhashed_first=False,
        lone_request_ignores_threshold=False,
        cursor_follows_victim=False,
        count_failed_lookups=True,
    ),
    "0.32": Rules(
        reuse_unhashed_first=True,
        lone_request_ignores_threshold=True,
        cursor_follows_victim=True,
        count_failed_lookups=False,
    ),
}


def rules_for(version: str) -> Rules:
    """The rule set of a vLLM version ("0.32", or "0.32.0").

    Raises:
        InputError: there is no rule set for it.
    """
    release = ".".join(version.split(".")[:2])
    if release not in RULES:
        raise InputError(
            f"no rule set for vLLM {version!r}",
            where="engine.version",
            fix=f"Use one of {', '.join(RULES)}.",
        )
    return RULES[release]
