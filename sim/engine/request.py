"""What a workload produces: requests, grouped into the streams of the stages of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

Content = tuple[tuple[int, int], ...]


class MediaItem(NamedTuple):
    """An image, a video or an audio clip in a prompt, after vLLM's ``MultiModalFeatureSpec``.

    It takes ``length`` tokens of the prompt, from ``offset`` on; the first ``lead`` and the last ``tail`` of
    them, and ``between`` others, are the model's own marks, without an embedding of the encoder. ``content``
    is equal for equal items. The encoder computes ``patches``, which attend to those of their own segment;
    ``pixels`` are those of the item as it is sent.
    """

    content: int
    offset: int
    length: int
    lead: int = 0
    tail: int = 0
    between: int = 0
    patches: int = 0
    segments: int = 1
    pixels: int = 0

    @property
    def embeds(self) -> int:
        """Embeddings that the encoder makes of it."""
        return self.length - self.lead - self.tail - self.between


ADAPTER_CONTENT = 1 << 40  # ids of shared contents stay below


def content_of_adapter(content: Content, adapter: int) -> Content:
    """The same tokens as an adapter sees them: block hashes include its name."""
    return tuple((number + adapter * ADAPTER_CONTENT, end) for number, end in content)


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
        adapter: number of its LoRA adapter, from 1; 0: the base model. Prompts of two adapters share nothing:
            their ``content`` differs (``content_of_adapter``).
        grammar: number of the grammar that its output follows, from 1; 0: none.
        media: images and the like in its prompt, in their order, whose tokens are a part of
            ``prompt_tokens``; where others carry the same, ``content`` says so.
    """

    request_id: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    content: Content = ()
    priority: int = 0
    abort_after_s: float | None = None
    group: int | None = None
    adapter: int = 0
    grammar: int = 0
    media: tuple[MediaItem, ...] = ()


@dataclass(slots=True, eq=False)
class Requests(Sequence[Request]):
    """Many requests as columns, see ``Request``; one by one they are made only where somebody asks for one.

    Attributes:
        content: (n,) place of each request's content in ``contents``, where each stands once.
        group: (n,) -1 where a request has none. priority, abort_after_s, adapter, grammar, media: (n,) None
            where all have none, ``abort_after_s`` NaN and ``media`` None where a request has none.
    """

    request_id: NDArray[np.int64]
    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    max_tokens: NDArray[np.int64]
    content: NDArray[np.int32]
    contents: list[Content]
    group: NDArray[np.int64] | None = None
    priority: NDArray[np.int64] | None = None
    abort_after_s: NDArray[np.float64] | None = None
    adapter: NDArray[np.int64] | None = None
    grammar: NDArray[np.int64] | None = None
    media: NDArray[np.object_] | None = None

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Requests:
        """The columns of requests that are there one by one."""
        if isinstance(requests, Requests):
            return requests
        rows, known = list(requests), dict[Content, int]()
        content = [known.setdefault(row.content, len(known)) for row in rows]

        def column(name: str, dtype: type, missing: float = 0) -> NDArray[Any] | None:
            values = [missing if (value := getattr(row, name)) is None else value for row in rows]
            return None if all(value is missing for value in values) else np.array(values, dtype)

        def whole(name: str) -> NDArray[np.int64]:
            return np.array([getattr(row, name) for row in rows], np.int64)

        return cls(
            whole("request_id"),
            np.array([row.arrival_s for row in rows], np.float64),
            whole("prompt_tokens"),
            whole("output_tokens"),
            whole("max_tokens"),
            np.array(content, np.int32),
            list(known),
            column("group", np.int64, -1),
            column("priority", np.int64),
            column("abort_after_s", np.float64, np.nan),
            column("adapter", np.int64),
            column("grammar", np.int64),
            media_column([row.media for row in rows]),
        )

    @classmethod
    def joined(cls, parts: Sequence[Requests]) -> Requests:
        """Several, one after the other."""
        if len(parts) == 1:
            return parts[0]
        contents: list[Content] = []
        places = []
        for part in parts:
            places.append(part.content + np.int32(len(contents)))
            contents += part.contents
        given = [name for name in _OPTIONAL if any(getattr(part, name) is not None for part in parts)]
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS}
        columns |= {
            name: np.concatenate(
                [
                    np.full(len(part), _OPTIONAL[name])
                    if getattr(part, name) is None
                    else getattr(part, name)
                    for part in parts
                ]
            )
            for name in given
        }
        return cls(**columns, content=np.concatenate(places), contents=contents)

    def __len__(self) -> int:
        return len(self.request_id)

    @overload
    def __getitem__(self, row: int) -> Request: ...
    @overload
    def __getitem__(self, row: slice) -> list[Request]: ...
    def __getitem__(self, row: int | slice) -> Request | list[Request]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        group = -1 if self.group is None else self.group.item(row)
        abort = None if self.abort_after_s is None else self.abort_after_s.item(row)
        return Request(
            self.request_id.item(row),
            self.arrival_s.item(row),
            self.prompt_tokens.item(row),
            self.output_tokens.item(row),
            self.max_tokens.item(row),
            self.contents[self.content.item(row)],
            0 if self.priority is None else self.priority.item(row),
            None if abort is None or abort != abort else abort,
            None if group < 0 else group,
            0 if self.adapter is None else self.adapter.item(row),
            0 if self.grammar is None else self.grammar.item(row),
            () if self.media is None else self.media[row] or (),
        )

    def __iter__(self) -> Iterator[Request]:
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def take(self, rows: NDArray[np.int64]) -> Requests:
        """Those at some rows."""
        columns = {name: getattr(self, name)[rows] for name in (*_COLUMNS, "content")}
        for name in _OPTIONAL:
            columns[name] = None if getattr(self, name) is None else getattr(self, name)[rows]
        return Requests(**columns, contents=self.contents)


_COLUMNS = ("request_id", "arrival_s", "prompt_tokens", "output_tokens", "max_tokens")
_OPTIONAL: dict[str, Any] = {
    "group": np.int64(-1),
    "priority": np.int64(0),
    "abort_after_s": np.nan,
    "adapter": np.int64(0),
    "grammar": np.int64(0),
    "media": None,
}


def media_column(media: Sequence[tuple[MediaItem, ...]]) -> NDArray[np.object_] | None:
    """``Requests.media`` of what each request carries."""
    if not any(media):
        return None
    column = np.empty(len(media), object)
    for row, items in enumerate(media):
        column[row] = items or None
    return column


@dataclass(slots=True)
class Stream:
    """One client: it sends its requests in order, each not before its arrival.

    ``max_concurrency`` bounds the requests in flight with a FIFO semaphore around the send (vllm bench
    serve's ``--max-concurrency``); all arrivals at 0 with a bound make a closed loop.
    A ``background`` stream stops sending once every foreground stream of its stage is done.
    ``until_s`` ends the sending so long after the stage's start.
    """

    name: str
    requests: Sequence[Request]
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
