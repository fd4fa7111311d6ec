"""What client, network and API server cost, outside the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from servecast.sim.inputs.errors import InputError


@dataclass(frozen=True, slots=True)
class FrontEndCosts:
    """Costs outside the engine, in seconds.

    Attributes:
        request_s: API server, per request: HTTP, chat template, tokenizer; requests in progress share it.
        token_s: API server, serial, per event streamed, of one token unless it lags: detokenizer, one event.
        latency_s: per request, not serial, on its way to the engine: connection, network, wake-ups.
        delivery_s: per token, not serial, on its way from the engine: wake-ups, network.
        client_request_s, client_token_s: the client's process, serial, per request and per event read.
        cv: coefficient of variation of the costs per request (gamma distributed, drawn per request).
    """

    request_s: float = 0.0
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
