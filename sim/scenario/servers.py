"""The servers that a scenario can name as ``engine.policy``: what each makes of flags, a model and a GPU.

What differs between servers is behind ``Server``, and nowhere else: another one is an entry of ``SERVERS``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.engine import Engine
from servecast.sim.engine.padded.contiguous import ContiguousBatching
from servecast.sim.engine.padded.paged import PagedBatching
from servecast.sim.engine.padded.static import StaticBatching
from servecast.sim.engine.speculation import Speculation
from servecast.sim.hardware.drafter import Drafter
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.memory import KVMemory
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.padded_memory import MemoryRisk
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.schema import did_you_mean, invalid
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.padded_server import Padded
from servecast.sim.scenario.vllm_server import Vllm


class Server(Protocol):
    """What differs between servers."""

    @property
    def engine(self) -> Callable[[EngineConfig], Engine]:
        """Makes its scheduler."""
        ...

    @property
    def step_times(self) -> Literal["physical", "padded"]:
        """The kind of step times where a scenario names no profile."""
        ...

    def title(self, version: str) -> str:
        """The server and its version, in words."""
        ...

    def check(self, flags: EngineFlags) -> None:
        """Raise ``schema.invalid`` where it has no such version or flag."""
        ...

    def notes(self, flags: EngineFlags) -> tuple[str, ...]:
        """What a result should say about this configuration: an assumed rule set, ignored flags."""
        ...

    def extra_error(self, flags: EngineFlags) -> float:
        """What is not modelled of this configuration adds so much to the relative error band."""
        ...

    def resolve(
        self,
        flags: EngineFlags,
        gpu: GPU,
        model: ModelShape,
        *,
        where: str = "engine",
        speculation: Speculation | None = None,
    ) -> EngineConfig:
        """The flags with its defaults filled in, all but the number of KV blocks.

        Args:
            model: says the longest context.
            where: what messages call the flags. speculation: how it drafts.

        Raises:
            InputError: it would refuse the combination, or nothing says the longest context.
        """
        ...

    def shard(self, flags: EngineFlags, config: EngineConfig, model: ModelShape, gpu: GPU) -> Shard:
        """A rank of the model, as the server splits it. InputError if it cannot."""
        ...

    def memory(
        self, flags: EngineFlags, config: EngineConfig, shard: Shard, drafter: Drafter | None = None
    ) -> KVMemory:
        """The account of its KV pool, which a drafter shares. InputError if the model does not fit."""
        ...

    def memory_risk(
        self, config: EngineConfig, shard: Shard, memory: KVMemory, longest_prompt: int
    ) -> MemoryRisk | None:
        """What a joint prefill of a full batch may need; None if the server measures that and sets it aside.

        Args:
            longest_prompt: of the traffic, in tokens.
        """
        ...

    def waits_for_blocks(self, flags: EngineFlags) -> bool:
        """Whether a request can wait for KV blocks."""
        ...


SERVERS: dict[str, Server] = {
    "vllm": Vllm(),
    "static": Padded(StaticBatching),
    "contiguous": Padded(ContiguousBatching),
    "paged": Padded(PagedBatching),
}


def checked(flags: EngineFlags) -> EngineFlags:
    """The flags, if there is such a server and it knows them. Raises as validators do."""
    if flags.policy not in SERVERS:
        fix = did_you_mean(flags.policy, SERVERS) or f"Known: {', '.join(SERVERS)}."
        raise invalid(f"there is no engine policy {flags.policy!r}", fix, at="policy")
    SERVERS[flags.policy].check(flags)
    return flags
