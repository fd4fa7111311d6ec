"""What a scenario sets of its router, and of how late the router knows things."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from servecast.sim.inputs.schema import Count, Model, NonNegative, Positive, did_you_mean, invalid
from servecast.sim.routing.llmd.release import EPP_RELEASES


def _release(name: str) -> str:
    if name not in EPP_RELEASES:
        raise invalid(
            f"there is no release {name!r} of the endpoint picker",
            did_you_mean(name, EPP_RELEASES) or f"Known are {', '.join(EPP_RELEASES)}.",
        )
    return name


class RouterOptions(Model):
    """Each option is read by the routers that it concerns.

    ``epp_release``: whose defaults and details an EndpointPickerConfig is run with: a release of the
    Gateway API Inference Extension. ``bytes_per_token``: mean length of a token in the prompt's text, for
    indexes over bytes.
    """

    scrape_interval_s: NonNegative = 0.05
    scrape_delay_s: NonNegative = 0.0
    event_lag_s: NonNegative = 0.005
    epp_release: Annotated[str, AfterValidator(_release)] = "v0.5"
    bytes_per_token: Positive = 4.0
    load_factor: Annotated[Positive, Field(ge=1)] = 1.25
    prefix_tokens: Count = 256
