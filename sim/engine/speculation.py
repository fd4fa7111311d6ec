"""Speculative decoding as the scheduler sees it: what drafts a method proposes, and how many are accepted."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

from servecast.sim.engine.draft_rules import draft_rules_for
from servecast.sim.engine.rules import RELEASES, minor_release, since
from servecast.sim.inputs.errors import InputError


@dataclass(frozen=True, slots=True)
class Method:
    """What vLLM's scheduler knows of a method of drafting; k is the number of drafts.

    Attributes:
        drafts_in_cache: the drafter writes KV of its own behind what the target computes, so that k slots
            more are reserved (VllmConfig.num_lookahead_tokens). infills: and one for a bonus query.
        takes_hidden_states: it reads the target's last hidden states (SpeculativeConfig.use_eagle).
        next_token_in_cache: its KV at a position depends on the token behind it: a hit's last block is
            computed again (needs_eagle_block_drop).
        own_query: its input keeps a token that the target's does not have (max_num_new_slots_for_drafting).
        parallel: drafts all k in one pass, whatever the flag says.
        async_by_default: async scheduling stays on; with others it turns off, or is refused.
        may_miss: it proposes 0 to k drafts, by what it finds.
        since: first release of ``RELEASES`` that has it.
    """

    drafts_in_cache: bool = False
    infills: bool = False
    takes_hidden_states: bool = False
    next_token_in_cache: bool = False
    own_query: bool = False
    parallel: bool = False
    async_by_default: bool = False
    may_miss: bool = False
    since: str = RELEASES[0]


_hidden = functools.partial(Method, drafts_in_cache=True, takes_hidden_states=True, async_by_default=True)

METHODS: dict[str, Method] = {
    "ngram": Method(may_miss=True),
    "ngram_gpu": Method(may_miss=True, async_by_default=True),
    "suffix": Method(may_miss=True),
    "medusa": Method(),
    "mlp_speculator": Method(),
    "eagle": _hidden(next_token_in_cache=True),
    "eagle3": _hidden(next_token_in_cache=True),
    "mtp": _hidden(next_token_in_cache=True),
    "draft_model": Method(drafts_in_cache=True, own_query=True, async_by_default=True),
    "dflash": _hidden(infills=True, parallel=True),
    "dspark": _hidden(parallel=True, since="0.25"),
}
"""By the name that ``--speculative-config`` has for it."""


Kind = tuple[tuple[float, ...], tuple[float, ...]]
"""What is accepted and proposed of some requests' drafts: see ``Speculation``."""


@dataclass(frozen=True, slots=True)
class Kinds:
    """Requests that differ in what is accepted of their drafts.

    Attributes:
        laws: of each kind, as many for each class of output lengths, in which all are equally frequent.
        from_tokens: the shortest output of each class, rising; the first also takes shorter ones.
    """

    laws: tuple[Kind, ...]
    from_tokens: tuple[int, ...] = (0,)


@dataclass(frozen=True, slots=True)
class Speculation:
    """How a deployment drafts; made by ``speculation``.

    Attributes:
        method: of ``METHODS``. num_tokens: k, drafts a step at most.
        lookahead: KV slots that are reserved behind the tokens of a step.
        draft_slots: input slots that the drafter adds to each request of a step.
        drops_block: the last block of a prefix hit is computed again.
        hash_lookahead: tokens behind a block that its hash covers, in place of ``drops_block``.
        prompt_lookahead: tokens of a prompt behind a chunk that several MTP modules read; 0: there are none.
        drafter_kinds: of KV cache groups those that drop the block; (): all.
        by_batch: (first number of requests, K) of the dynamic schedule, rising; (): always k.
        acceptance: k probabilities that the first 1, 2, .. k drafts are all accepted, none above the one
            before; 1 + their sum tokens come from a step, on average.
        proposed: probabilities that 0, 1, .. k drafts are proposed; (): always k.
        kinds: of requests, in place of ``acceptance`` and ``proposed``, which are then those of all together;
            None: all are alike.
        seed: of the draws. A draw depends on it, on the request's id and on the number of the request's
            draw alone, so the order of requests and the replica change nothing.
    """

    method: str
    num_tokens: int
    lookahead: int
    draft_slots: int
    drops_block: bool
    hash_lookahead: int
    acceptance: tuple[float, ...]
    by_batch: tuple[tuple[int, int], ...] = ()
    proposed: tuple[float, ...] = ()
    kinds: Kinds | None = None
    seed: int = 0
    prompt_lookahead: int = 0
    drafter_kinds: tuple[str, ...] = ()


def speculation(
    version: str,
    method: str,
    num_tokens: int,
    acceptance: tuple[float, ...],
    *,
    parallel_drafting: bool = False,
    disable_eagle_block_drop: bool = False,
    by_batch: tuple[tuple[int, int], ...] = (),
    proposed: tuple[float, ...] = (),
    kinds: Kinds | None = None,
    seed: int = 0,
) -> Speculation:
    """What a release's scheduler makes of a method.

    Args:
        version: vLLM's. parallel_drafting, disable_eagle_block_drop: as in ``--speculative-config``.
        by_batch, acceptance, proposed, kinds, seed: see ``Speculation``.

    Raises:
        InputError: the release has no such method or option, or the numbers do not fit together.
    """
    where = "speculative_config"
    known, release, rules = METHODS.get(method), minor_release(version), draft_rules_for(version)
    if known is None or not since(release, known.since):
        raise InputError(
            f"vLLM {release} drafts by no method {method!r}",
            where=f"{where}.method",
            fix=f"Use one of {', '.join(METHODS)}.",
        )
    for option, given in (("disable_eagle_block_drop", disable_eagle_block_drop), ("by_batch", by_batch)):
        if given and not getattr(rules, option):
            raise InputError(f"vLLM {release} has no {option}", where=where, fix="Leave it out.")
    if num_tokens < 1:
        raise InputError(f"{num_tokens} drafts a step", where=where, fix="Give num_speculative_tokens >= 1.")
    for rates, shares in ((acceptance, proposed), *(kinds.laws if kinds else ())):
        falls = all(a >= b for a, b in itertools.pairwise((1.0, *rates, 0.0)))
        if len(rates) != num_tokens or not falls:
            raise InputError(
                f"acceptance {list(rates)} of {num_tokens} drafts",
                where=where,
                fix=f"Give {num_tokens} probabilities between 0 and 1, none above the one before.",
            )
        whole = len(shares) == num_tokens + 1 and abs(sum(shares) - 1.0) < 1e-9
        if shares and not (known.may_miss and whole):
            raise InputError(
                f"probabilities {list(shares)} that {method} proposes 0 to {num_tokens} drafts",
                where=where,
                fix="Give them for ngram, ngram_gpu and suffix only: one more than drafts, with the sum 1.",
            )
    if by_batch and (by_batch[0][0] != 1 or any(a >= b for (a, _), (b, _) in itertools.pairwise(by_batch))):
        raise InputError(
            f"batch sizes {[first for first, _ in by_batch]}", where=where, fix="Begin with 1 and rise."
        )
    drops = known.next_token_in_cache or (known.takes_hidden_states and not rules.hashes_next_token)
    drops = drops and not disable_eagle_block_drop
    slots = int(known.own_query)
    if known.parallel and rules.own_pass:
        slots = 0
    elif known.parallel or parallel_drafting:
        slots += num_tokens - 1 + (known.infills and rules.infill_slots)
    return Speculation(
        method=method,
        num_tokens=num_tokens,
        lookahead=num_tokens + (known.infills and rules.infills) if known.drafts_in_cache else 0,
        draft_slots=slots,
        drops_block=drops and not rules.hashes_next_token,
        hash_lookahead=int(drops and rules.hashes_next_token),
        acceptance=acceptance,
        by_batch=by_batch,
        proposed=proposed,
        kinds=kinds,
        seed=seed,
    )


def by_modules(drafts: Speculation, version: str, modules: int) -> Speculation:
    """The same by so many MTP modules (num_nextn_predict_layers), of which each reads a token further."""
    several = drafts.method == "mtp" and min(modules, drafts.num_tokens) > 1
    if not several or not draft_rules_for(version).modules_look_ahead:
        return drafts
    k = drafts.num_tokens
    return replace(drafts, prompt_lookahead=k, hash_lookahead=k if drafts.hash_lookahead else 0)
