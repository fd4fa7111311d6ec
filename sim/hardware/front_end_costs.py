"""What client, network and API server cost, outside the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

from servecast.sim.inputs.errors import InputError

Prompts = Literal["text", "random_text", "token_ids"]  # what clients send
_ENCODING: dict[Prompts, float] = {"text": 1.0, "random_text": 1.75, "token_ids": 0.0}  # relative cost


@dataclass(frozen=True, slots=True)
class FrontEndCosts:
    """Costs outside the engine, in seconds.

    Attributes:
        request_s: API server, per request: HTTP, chat template, tokenizer; requests in progress share it.
        prompt_token_s: the tokenizer's thread behind it, serial, per token of a prompt, JSON included. That
            of text; see ``of_prompts``.
        token_s: API server, serial, per event streamed, of one token unless it lags: detokenizer, one event.
        latency_s: per request, not serial, on its way to the engine: connection, network, wake-ups.
        delivery_s: per token, not serial, on its way from the engine: wake-ups, network.
        client_request_s, client_token_s: the client's process, serial, per request and per event read.
        cv: coefficient of variation of the costs per request (gamma distributed, drawn per request).
    """

    request_s: float = 0.0
    prompt_token_s: float = 0.0
    token_s: float = 0.0
    latency_s: float = 0.0
    delivery_s: float = 0.0
    client_request_s: float = 0.0
    client_token_s: float = 0.0
    cv: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0.0 <= value < math.inf:
                raise InputError(
                    f"{field.name} is {value}", where=f"front_end.{field.name}", fix="Make it 0 or more."
                )

    @classmethod
    def typical(cls) -> FrontEndCosts:
        """Of a server that nobody measured, driven from the same machine.

        Encoding takes 1.2 to 1.5 us a token of English text (tokenizers 0.23; 2.2 to 2.8 us of the text of
        random token ids), JSON and messages 0.1 to 0.3 us more. Three sets of H100 servers answered prompts
        of 250 to 1,000 tokens 7.5 to 10.5 ms later than their engines, which leaves 6 to 8 ms beside these.
        The cost of a request and its variation, 0.8 to 1 ms and 0.5, are weakly known. That of a streamed
        event,
        10 to 50 us, is not: none.
        """
        return cls(request_s=0.9e-3, prompt_token_s=1.6e-6, latency_s=7e-3, cv=0.5)

    def of_prompts(self, prompts: Prompts) -> FrontEndCosts:
        """With prompts that are sent as text, as the text of random token ids (as benchmarks do, which is
        slower to encode), or as token ids, which are not encoded."""
        return replace(self, prompt_token_s=self.prompt_token_s * _ENCODING[prompts])

    def over_network(self, round_trip_s: float) -> FrontEndCosts:
        """From a client that is so far away. All of it stands behind the engine: a request that comes later
        and a token that arrives later look the same to the client, and only the sum shows in its times."""
        return replace(self, delivery_s=self.delivery_s + round_trip_s)
