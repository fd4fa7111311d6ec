"""Step time over pipeline stages: each stage's own, and the way of the activations from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from servecast.sim.engine.engine import StepShape
from servecast.sim.engine.pipeline import Pipeline
from servecast.sim.hardware.step_time.physical import Binding, PhysicalStepTime

_TENSORS = 2  # hidden states and residual (the models' make_empty_intermediate_tensors)
_NETWORK_S = 20e-6  # assumed: latency of a message between two nodes


class PipelinedStepTime:
    """How long a step takes through all stages, if nothing is in its way; see ``StepTime``.

    Args:
        stages: of each stage. network: bytes/s of each GPU's own way to another node.
        stages_per_node: that lie in one node, next to each other.
    """

    def __init__(self, stages: tuple[PhysicalStepTime, ...], network: float, stages_per_node: int) -> None:
        self.stages = stages
        self._network, self._per_node = network, stages_per_node

    def seconds(self, step: StepShape) -> float:
        """Of all stages, one after the other."""
        return sum(stage.seconds(step) for stage in self.stages) + self._handed_over(step)

    def roofline_seconds(self, step: StepShape) -> float:
        """Of all stages; handing over takes no time."""
        return sum(stage.roofline_seconds(step) for stage in self.stages)

    def breakdown(self, step: StepShape) -> Mapping[str, float]:
        """Parts of all stages, and ``hand_over``."""
        parts: dict[str, float] = {}
        for stage in self.stages:
            for name, seconds in stage.breakdown(step).items():
                parts[name] = parts.get(name, 0.0) + seconds
        return parts | {"hand_over": self._handed_over(step)} if parts else parts

    def binding(self, step: StepShape) -> Binding:
        """What most of the slowest stage's time goes to."""
        return max(self.stages, key=lambda stage: stage.seconds(step)).binding(step)

    def hand_over(self, place: int, tokens: int) -> float:
        """Seconds that the activations of so many tokens take from a stage to the next.

        Each tensor-parallel rank sends its part of both tensors, and the ranks behind gather the parts
        (``GroupCoordinator.send_tensor_dict``, ``all_gather_group``).
        """
        stage = self.stages[place]
        model, ranks, eff = stage.shard.model, stage.shard.tensor_parallel_size, stage.efficiencies
        size = tokens * model.hidden_size * model.dtype_bytes
        link = stage.link
        if (place + 1) % self._per_node == 0:
            sent = _NETWORK_S + _TENSORS * size / ranks / (self._network * eff.link)
        else:
            assert link is not None
            sent = eff.allreduce_s + _TENSORS * size / ranks / (link * eff.link)
        return sent + (_TENSORS * stage.gathered(size) if ranks > 1 else 0.0)

    def pipeline(self, stride: int) -> Pipeline:
        """The stages for an engine; ``stride`` as there."""
        ways: list[Callable[[int], float]] = []
        for place in range(len(self.stages) - 1):
            known: dict[int, float] = {}

            def way(tokens: int, place: int = place, known: dict[int, float] = known) -> float:
                if tokens not in known:
                    known[tokens] = self.hand_over(place, tokens)
                return known[tokens]

            ways.append(way)
        costs = tuple(stage.costs() for stage in self.stages)
        return Pipeline(costs, tuple(ways), stride)

    def _handed_over(self, step: StepShape) -> float:
        tokens = step.decodes + sum(tokens for tokens, _ in step.chunks)
        return sum(self.hand_over(place, tokens) for place in range(len(self.stages) - 1)) if tokens else 0.0
