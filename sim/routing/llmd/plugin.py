"""What an EndpointPickerConfig comes to: the plugins that decide where a request goes."""

from __future__ import annotations

from dataclasses import dataclass, field

from servecast.sim.inputs.errors import InputError
from servecast.sim.routing.llmd.parameters import Parameters

APPROXIMATE, PRECISE = "approx-prefix-cache-producer", "precise-prefix-cache-producer"
IN_FLIGHT = "inflight-load-producer"


@dataclass(frozen=True, slots=True)
class Plugin:
    """One of ``plugins``: its type (by today's name), its own name, its parameters.

    prefixes, load: names of the producers that tell it of cached prefixes and of requests in flight, empty
    where it asks for none.
    """

    type: str
    name: str
    parameters: Parameters
    prefixes: str = ""
    load: str = ""


@dataclass(frozen=True, slots=True)
class EppConfig:
    """What decides where a request goes.

    scorers: in the order of the profile, with their weights. picker: the profile's. filters: in order.
    producers: what scorers and filters ask, those that are theirs alone included. exact_tokens: prompts are
    tokenized as the servers do, not estimated from their length. notes: what has no effect here, and why.
    split: where prompts may be computed by servers of their own; the other fields are then of decode.
    """

    picker: Plugin
    scorers: tuple[tuple[Plugin, float], ...] = ()
    filters: tuple[Plugin, ...] = ()
    producers: tuple[Plugin, ...] = ()
    exact_tokens: bool = False
    source: str = field(default="", compare=False)
    notes: tuple[str, ...] = ()
    split: Split | None = None


@dataclass(frozen=True, slots=True)
class Split:
    """A profile handler that runs a profile for prefill and one for decode.

    prefill: what decides on the prompt's server. decider: whether there is one, asked with the decode server;
    None: never, or with ``prefill_first`` always, and the prompt's server is picked before the other.
    """

    prefill: EppConfig
    decider: Plugin | None = None
    prefill_first: bool = False


class NotModelled(InputError):
    """The picker takes it, the model does not."""
