"""Step time of a padded batch: a decode pass, and a joint prefill pass padded to its longest prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from servecast.sim.engine.engine import StepShape
from servecast.sim.engine.padded.batch import PaddedStep
from servecast.sim.hardware.mixing import prompt_pair_flops
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.mixers import IDEAL, mixing_of
from servecast.sim.hardware.step_time.physical import Binding, PhysicalStepTime
from servecast.sim.inputs.errors import InputError


@dataclass(frozen=True, slots=True)
class PaddedCosts:
    """What a server of padded batches adds to the datasheet. Seconds, shares and counts.

    The defaults are of the size of the ``infer`` server's on an RTX 5080, for a server that nobody measured.

    Attributes:
        step_s: of a decode pass, beyond reading the weights once: kernel launches and the host.
        row_s: the same per row that decodes: sampling, detokenizing, writing its KV.
        kv_passes: how many times the padded KV, expanded to all query heads, crosses the memory bus in a
            decode pass: gathering slots, expanding and masked attention each read or write it.
        prefill_s: of a prefill pass, beyond its FLOPs.
        compute: share of the GPU's peak FLOP/s that a pass reaches.
    """

    step_s: float = 5e-3
    row_s: float = 1e-3
    kv_passes: float = 3.7
    prefill_s: float = 25e-3
    compute: float = 0.89

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "compute":
                good, rule = 0.0 < value <= 1.0, "above 0 and at most 1: nothing beats the datasheet"
            elif field.name == "kv_passes":
                good, rule = 1.0 <= value < math.inf, "at least 1: the KV is read once"
            else:
                good, rule = 0.0 <= value < math.inf, "0 or more seconds"
            if not good:
                raise InputError(
                    f"{field.name} is {value}", where=f"padded.{field.name}", fix=f"Make it {rule}."
                )


class PaddedStepTime:
    """The sum of a decode pass and a prefill pass.

    - decode pass: step_s + the longer of reading the weights and computing a token of each row
      + row_s x decoding rows + kv_passes x KV bytes of rows x longest / bandwidth
    - prefill pass: prefill_s + the longer of reading the weights and computing rows x longest prompt tokens;
      where prompts come in chunks, the older KV is read as in a decode pass

    ``longest`` is the longest row of the pass: all are padded to it. A prompt token costs its attention and
    2 FLOPs a parameter, the LM head's among them, since such a server computes the logits of all positions.

    Args:
        shard: the whole model on one GPU. costs: what was learned of the server.
    """

    def __init__(self, shard: Shard, costs: PaddedCosts) -> None:
        self.model, self.costs = shard.model, costs
        model, gpu = shard.model, shard.gpu
        self.roofline_seconds = PhysicalStepTime(shard).roofline_seconds
        rate = costs.compute * gpu.bf16_flops
        expanded = 2 * model.layers * model.heads * model.head_dim * model.dtype_bytes
        self._weights_s = shard.weight_bytes / gpu.bandwidth
        self._kv_s = costs.kv_passes * expanded / gpu.bandwidth
        self._token_s = 2.0 * model.active_parameters / rate
        self._attention = mixing_of(shard, [IDEAL for _ in model.layer_kinds]).attention
        self._pair_s = prompt_pair_flops(model.layer_kinds[0], 1) / rate

    def seconds(self, step: StepShape) -> float:
        """Duration of the step in seconds. A step with nothing in it takes no time."""
        return sum(self.breakdown(step).values())

    def breakdown(self, step: StepShape) -> dict[str, float]:
        """Part -> seconds; they add up to ``seconds``. A step that says nothing of its padding is taken to
        have decoding rows of equal length."""
        costs, parts = self.costs, {}
        if step.decodes:
            if isinstance(step, PaddedStep):
                rows, padded = step.rows, step.rows * step.longest
            else:
                rows, padded = step.decodes, step.decode_context
            parts["decode_step"] = costs.step_s
            parts["decode_linear"] = max(self._weights_s, rows * self._token_s)
            parts["decode_rows"] = costs.row_s * step.decodes
            parts["attention_decode"] = self._kv_s * padded
        if step.chunks:
            rows = len(step.chunks)
            tokens = max(tokens for tokens, _ in step.chunks)
            older = max(context for _, context in step.chunks)
            pairs = sum(each.layers * each.pairs(tokens, older) for each in self._attention)
            flops_s = tokens * self._token_s + pairs * self._pair_s
            parts["prefill_step"] = costs.prefill_s
            parts["prefill_linear"] = max(self._weights_s, rows * flops_s)
            parts["attention_prefill"] = self._kv_s * rows * older
        return parts

    def binding(self, step: StepShape) -> Binding:
        """What most of the step's time goes to."""
        parts = self.breakdown(step)
        spent: dict[Binding, float] = {"host": 0.0, "memory_bandwidth": 0.0, "compute": 0.0}
        for name, seconds in parts.items():
            if name.endswith("_linear"):
                spent["compute" if seconds > self._weights_s else "memory_bandwidth"] += seconds
            else:
                spent["memory_bandwidth" if name.startswith("attention") else "host"] += seconds
        return max(spent, key=lambda side: spent[side])
