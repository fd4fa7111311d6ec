"""What a workload produces: requests, grouped into the streams of the stages of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Request:
    """One request as the client means to send it.

    ``content`` names the shared leading parts of the prompt: ``((content_id, end_token), ...)`` with
    rising ``end_token``, up to the prompt's end, or beyond it where the output is a part of later prompts.
    Part k covers the tokens from the end of part k-1 up to its
    own end, and its id stands for those tokens *and everything before them* (as the hash ids of a
    Mooncake trace do), so two requests share a KV block exactly when the block's last token lies in
    parts with equal ids. Tokens after the last part belong to this request alone.

    Attributes:
        request_id: unique within a run, rising in the order of generation.
        arrival_s: when the client means to send it, in seconds from the start of its stage.
        prompt_tokens: prompt length in tokens, >= 1.
        output_tokens: tokens that the model will produce before it stops, 1..max_tokens.
        max_tokens: the limit given to the engine; ``output_tokens < max_tokens`` is a stop token.
        content: shared parts of the prompt, see above.
        priority: lower runs first under ``--scheduling-policy priority``.
        abort_after_s: the client goes away this long after sending, or None.
        group: label of the group the request belongs to (prefix group, session), or None.
    """

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    content: tuple[tuple[int, int], ...] = ()
    priority: int = 0
    abort_after_s: float | None = None
    group: int | None = None


@dataclass(slots=True)
class Stream:
    """One client: it sends its requests in order, each not before its arrival.

    ``max_concurrency`` bounds the requests in flight with a FIFO semaphore around the send (vllm bench
    serve's ``--max-concurrency``); all arrivals at 0 with a bound make a closed loop.
    A ``background`` stream stops sending once every foreground stream of its stage is done.
    ``until_s`` ends the sending so long after the stage's start.
    """

    name: str
    requests: list[Request]
    max_concurrency: int | None = None
    background: bool = False
    until_s: float | None = None


@dataclass(slots=True)
class Stage:
    """Streams that run together. With ``drain`` the next stage starts when all its requests are done, or
    rather when the client notices (``end_s``: from then to the next start, in seconds from the stage's),
    otherwise ``duration_s`` after its start."""

    name: str
    streams: list[Stream] = field(default_factory=list)
    drain: bool = True
    duration_s: float | None = None
    end_s: Callable[[float], float] | None = None
