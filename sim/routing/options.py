"""What a scenario sets of its router, and of how late the router knows things."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from servecast.sim.inputs.schema import Count, Model, NonNegative, Positive, did_you_mean, invalid
from servecast.sim.routing.llmd.release import EPP_RELEASES, NEWEST


def _release(name: str) -> str:
    if name not in EPP_RELEASES:
        fix = did_you_mean(name, EPP_RELEASES) or f"Known are {', '.join(EPP_RELEASES)}."
        raise invalid(f"there is no release {name!r} of the endpoint picker", fix)
    return name


class RouterOptions(Model):
    """Each option is read by the routers that it concerns."""

    scrape_interval_s: NonNegative = 0.05
    """Time between two scrapes of a replica's gauges."""
    scrape_delay_s: NonNegative = 0.0
    """Time from a scrape until the router knows its result."""
    event_lag_s: NonNegative = 0.005
    """Time from a KV event until the router knows of it."""
    epp_release: Annotated[str, AfterValidator(_release)] = NEWEST
    """Release of the endpoint picker with whose defaults and details an EndpointPickerConfig is run: of the
    llm-d router, or up to v1.5 of the Gateway API Inference Extension. Default, the newest."""
    bytes_per_token: Positive = 4.0
    """Mean length of a token in the prompt's text, for prefix indexes over bytes."""
    load_factor: Annotated[Positive, Field(ge=1)] = 1.25
    """``consistent_hashing``: most load of a replica, as a multiple of the mean."""
    prefix_tokens: Count = 256
    """``consistent_hashing``, ``prefix_affinity``, and ``session_hashing`` of requests without a session:
    leading tokens that decide where a prompt goes."""
