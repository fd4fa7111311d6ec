"""How long a step takes that verifies drafts and proposes the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from servecast.sim.engine.engine import StepShape
from servecast.sim.engine.step_costs import StepCosts
from servecast.sim.hardware.drafter import Drafter
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import Binding, Efficiencies, PhysicalStepTime

PASS_S = 0.1e-3  # assumed: what the GPU waits for the host between two passes of a drafter


@dataclass(frozen=True, slots=True)
class _Pass:
    """A pass of a drafter, as a StepShape."""

    chunks: Sequence[tuple[int, int]]
    decodes: int
    drafts: int
    decode_context: int
    samples: int
    drafters: int = 0
    draft_length: int = 0


class SpeculativeStepTime:
    """The time of a target's step, whose decodes have drafts to verify, and of its drafter behind it.

    The target's is that of ``PhysicalStepTime`` with 1 + d tokens a decoding request: they pass its layers
    and its LM head, and attention reads a request's context once for all of them. The drafter's is one pass
    over the same tokens, and one over a token of each request for every draft but the first; of all drafts at
    once one pass over tokens and slots. The target's next step waits for it. Drafts are not sampled.

    Args:
        target: the model's own. drafter: what drafts. efficiencies: of its kernels, as the target's.
        skips: no drafts are made for a step without requests that can use them (from 0.33 on).

    Raises:
        InputError: the drafter's layers cannot be split over its ranks.
    """

    def __init__(
        self, target: PhysicalStepTime, drafter: Drafter, efficiencies: Efficiencies, *, skips: bool
    ) -> None:
        self.target, self.drafter, self.skips = target, drafter, skips
        self.first: PhysicalStepTime | None = None
        self.later: PhysicalStepTime | None = None
        shard = drafter.shard(target.shard)
        if shard is not None:
            own = replace(efficiencies, host_fixed_s=PASS_S, host_per_seq_s=0.0)
            self.first = PhysicalStepTime(shard, own, slots=drafter.slots, greedy=True)
            self.later = PhysicalStepTime(shard, own, greedy=True)

    @property
    def shard(self) -> Shard:
        """The target's."""
        return self.target.shard

    def seconds(self, step: StepShape) -> float:
        """Duration of the step in seconds, drafting included."""
        total = self.target.seconds(step)
        return total + self.drafting(step) if step.decodes or step.chunks else total

    def passes(self, step: StepShape) -> tuple[tuple[int, PhysicalStepTime, _Pass], ...]:
        """How often which pass runs behind a step."""
        requests = step.decodes + len(step.chunks)
        context = step.decode_context + sum(new + before for new, before in step.chunks)
        drafts, drafters, length = _drafts(step)
        length = 0 if self.skips and not drafters else length
        if self.first is None or self.later is None or not requests:
            return ()
        how = self.drafter.passes
        if how == "infill":
            return ((1, self.first, _Pass((), requests, 0, context, length * requests)),)
        rows = requests * length if how == "at once" else requests
        first = _Pass(step.chunks, step.decodes, drafts, step.decode_context, rows)
        if length < 2 or how == "at once":
            return ((1, self.first, first),)
        later = _Pass((), requests, 0, context, requests)
        return ((1, self.first, first), (length - 1, self.later, later))

    def drafting(self, step: StepShape) -> float:
        """Seconds of the drafter behind a step."""
        lookup = self.drafter.lookup
        if lookup is not None:
            requests = step.decodes + len(step.chunks)
            context = step.decode_context + sum(new + before for new, before in step.chunks)
            return lookup.step_s + requests * lookup.request_s + context * lookup.token_s
        total = 0.0
        for count, model, shape in self.passes(step):
            total += count * model.seconds(shape)
        return total

    def costs(self) -> StepCosts:
        """The same for the engine's core, to the bit."""
        lookup, how = self.drafter.lookup, self.drafter.passes
        numbers = {
            "skips": self.skips,
            "infills": how == "infill",
            "at_once": how == "at once",
            "step_s": lookup.step_s if lookup else 0.0,
            "request_s": lookup.request_s if lookup else 0.0,
            "token_s": lookup.token_s if lookup else 0.0,
        }
        passes = (None if each is None else each.costs() for each in (self.first, self.later))
        costs: StepCosts = self.target.costs().with_drafts(numbers, *passes)
        return costs

    def roofline_seconds(self, step: StepShape) -> float:
        """The target's, and that of each pass, which has to wait for the one before."""
        passes = sum(count * model.roofline_seconds(shape) for count, model, shape in self.passes(step))
        return self.target.roofline_seconds(step) + passes

    def breakdown(self, step: StepShape) -> dict[str, float]:
        """Part -> seconds: the target's parts, which verify, and ``drafting``."""
        parts = self.target.breakdown(step)
        return parts | {"drafting": self.drafting(step)} if parts else parts

    def binding(self, step: StepShape) -> Binding:
        """What most of the step's time goes to: of the target, or of the drafter where that takes longer."""
        if self.drafting(step) <= self.target.seconds(step):
            return self.target.binding(step)
        longest = max(self.passes(step), key=lambda each: each[0] * each[1].seconds(each[2]), default=None)
        return "host" if longest is None else longest[1].binding(longest[2])


def _drafts(step: StepShape) -> tuple[int, int, int]:
    """Drafts that a step verifies, requests that propose the next ones, and how many each."""
    names = ("drafts", "drafters", "draft_length")
    drafts, drafters, length = (int(getattr(step, name, 0)) for name in names)
    return drafts, drafters, length
