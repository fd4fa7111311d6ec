"""Which leading blocks two prompts have in common, for blocks of any size in tokens or bytes.

A block's identity is an integer, equal where the blocks and everything before them are equal: what a chain
of hashes over the prompt would say, without the prompt's bytes (see ``Request.content``).
"""

from __future__ import annotations

from functools import lru_cache

from servecast.sim.engine.kv_events import BLOCKS_PER_CONTENT
from servecast.sim.engine.request import Request

REMEMBERED = 4096  # different prompts


class PromptBlocks:
    """Identities of the full blocks of a prompt, from its first on.

    A block belongs to the part of the prompt in which its last token (or byte) lies.

    Args:
        size: of a block. per_token: what a token is long in the same unit: 1 for blocks of tokens, the mean
            number of bytes of a token for blocks of bytes.
        limit: at most so many blocks; None is no limit. partial: what is left at the end is a block, too.
    """

    __slots__ = ("_limit", "_partial", "_per_token", "_shared", "_size")

    def __init__(
        self, size: int, per_token: float = 1.0, limit: int | None = None, *, partial: bool = False
    ) -> None:
        self._size, self._per_token, self._limit, self._partial = size, per_token, limit, partial
        self._shared = lru_cache(REMEMBERED)(self._of_content)

    def shared(self, request: Request) -> list[int]:
        """The blocks that another request may have, too. Not to be changed: it is remembered."""
        content, end = request.content, request.prompt_tokens
        if content and content[-1][1] > end:  # it goes on over the output
            content = tuple((part, min(last, end)) for part, last in content)
        return self._shared(content)

    def all(self, request: Request) -> list[int]:
        """All blocks of the prompt."""
        shared, count = self.shared(request), self._blocks(request.prompt_tokens)
        if self._partial:
            length = int(request.prompt_tokens * self._per_token)
            count += length > count * self._size and count != self._limit
        if len(shared) >= count:
            return shared
        if self._partial and request.content and request.content[-1][1] == request.prompt_tokens:
            return [*shared, 2 * request.content[-1][0] * BLOCKS_PER_CONTENT + len(shared)]
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
