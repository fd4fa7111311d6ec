"""The ports through which KV blocks leave prefill servers and reach decode servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from servecast.sim.fleet.disaggregation import Link
from servecast.sim.inputs.units import PICOSECONDS, to_ps


@dataclass(frozen=True, slots=True)
class KVSide:
    """The KV cache of one server.

    Attributes:
        ranks: of tensor parallelism. heads: KV heads of the whole model; 1 where every rank has the whole
            cache (latents). block_size: tokens a block. bytes_per_block: on one rank, of all layers that a
            block holds. tensors: in which it has a part each: keys and values, or latents, of each of them.
    """

    ranks: int
    heads: int
    block_size: int
    bytes_per_block: int
    tensors: int

    @property
    def latent(self) -> bool:
        """Whether every rank has the whole cache, not its share of the heads."""
        return self.heads == 1


def sources(prefill: KVSide, decode: KVSide, rank: int) -> Sequence[int]:
    """Ranks of the prefill server that a rank of the decode server reads from (compute_tp_mapping): one, or
    where there are more of them than here, one for each head that this rank needs."""
    if decode.latent or decode.ranks >= prefill.ranks:
        return (rank * prefill.ranks // decode.ranks,)
    many = prefill.ranks // decode.ranks
    first: dict[int, int] = {}
    for source in range(rank * many, (rank + 1) * many):
        first.setdefault(source * prefill.heads // prefill.ranks, source)
    return tuple(first.values())


def runs(here: Sequence[int], there: Sequence[int]) -> int:
    """Stretches of blocks that neighbour each other on both sides: each is one descriptor a tensor."""
    return 1 + sum(
        here[i] + 1 != here[i + 1] or there[i] + 1 != there[i + 1]
        for i in range(min(len(here), len(there)) - 1)
    )


class Ports:
    """Ports of all servers: one a GPU and way, or one a server. What goes through a port goes first come,
    first served; a transfer takes the port that it leaves and the one that it reaches at once. Times are
    picoseconds.

    Args:
        sides: of the engine cores of all servers, one by one. copies_s_per_byte: through the host, on both
            sides, where KV is staged there. servers: whose each core is; None: each has one.
    """

    def __init__(
        self,
        link: Link,
        sides: Sequence[KVSide],
        copies_s_per_byte: float = 0.0,
        servers: Sequence[int] | None = None,
    ) -> None:
        self._link, self._sides, self._copies = link, sides, copies_s_per_byte
        self.servers = range(len(sides)) if servers is None else servers
        self._free: dict[tuple[int, int, bool], int] = {}  # (core, rank, whether it leaves) -> free from
        self._posting: dict[tuple[int, int], int] = {}

    def send(self, prefill: int, decode: int, blocks: int, descriptors: int, now: int) -> tuple[int, int]:
        """A decode server reads so many blocks of a prefill server, each of its ranks what it needs.

        Returns:
            When the last rank has all, and the bytes that went.
        """
        link, here, there = self._link, self._sides[decode], self._sides[prefill]
        end, total = now, 0
        for rank in range(here.ranks):
            found = sources(there, here, rank)
            size = blocks * here.bytes_per_block
            posted = max(now, self._posting.get((decode, rank), 0))
            posted += to_ps(descriptors * here.tensors * len(found) * link.descriptor_s)
            self._posting[decode, rank] = posted
            for source in found:
                part = size // len(found)
                wire = round(part / link.bandwidth * PICOSECONDS)
                out, into = (prefill, source, True), (decode, rank, False)
                if link.per_server:
                    out, into = (self.servers[prefill], 0, True), (self.servers[decode], 0, False)
                start = max(posted, self._free.get(out, 0), self._free.get(into, 0))
                self._free[out] = self._free[into] = start + wire
                end = max(end, start + wire + to_ps(link.latency_s + part * self._copies))
            total += size
        return end, total
