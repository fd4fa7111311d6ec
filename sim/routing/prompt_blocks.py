"""Which leading blocks two prompts have in common, for blocks of any size in tokens or bytes.

A block's identity is an integer, equal where the blocks and everything before them are equal: what a chain
of hashes over the prompt would say, without the prompt's bytes (see ``Request.content``).
"""

from __future__ import annotations

from functools import lru_cache

from servecast.sim.engine.request import Request
from servecast.sim.engine.sequence import BLOCKS_PER_CONTENT

_REMEMBERED = 4096  # different prompts


class PromptBlocks:
    """Identities of the full blocks of a prompt, from its first on; a partial block at the end has none.

    A block belongs to the part of the prompt in which its last token (or byte) lies.

    Args:
        size: of a block. per_token: what a token is long in the same unit: 1 for blocks of tokens, the mean
            number of bytes of a token for blocks of bytes.
        limit: at most so many blocks; None is no limit.
    """

    __slots__ = ("_limit", "_per_token", "_shared", "_size")

    def __init__(self, size: int, per_token: float = 1.0, limit: int | None = None) -> None:
        self._size, self._per_token, self._limit = size, per_token, limit
        self._shared = lru_cache(_REMEMBERED)(self._of_content)

    def shared(self, request: Request) -> list[int]:
        """The blocks that another request may have, too. Not to be changed: it is remembered."""
        return self._shared(request.content)

    def all(self, request: Request) -> list[int]:
        """All blocks of the prompt."""
        shared, count = self._shared(request.content), self._blocks(request.prompt_tokens)
        if len(shared) >= count:
            return shared
        own = (2 * request.request_id + 1) * BLOCKS_PER_CONTENT  # odd: nobody else's
        return [*shared, *range(own + len(shared), own + count)]

    def _of_content(self, content: tuple[tuple[int, int], ...]) -> list[int]:
        ids: list[int] = []
        for content_id, end_token in content:
            first = 2 * content_id * BLOCKS_PER_CONTENT
            ids.extend(range(first + len(ids), first + self._blocks(end_token)))
        return ids

    def _blocks(self, tokens: int) -> int:
        blocks = int(tokens * self._per_token) // self._size
        return blocks if self._limit is None else min(blocks, self._limit)
