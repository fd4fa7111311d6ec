"""How long something takes: a number of seconds, or a law."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from servecast.sim.inputs.schema import Model, NonNegative, Positive, invalid
from servecast.sim.traffic.measured_lengths import QUANTILE, check_quantiles, draw_quantiles, gather_quantiles


class Seconds(Model):
    """A number of seconds, ``{mean: 20}`` (exponential), or two or more quantiles, as ``{p50: 5, p95:
    60}``."""

    fixed: NonNegative | None = None
    """Always as long; ``think_s: 5`` is short for it."""
    mean: Positive | None = None
    """Mean of an exponential law."""
    quantiles: dict[str, Positive] | None = None
    """Seconds by quantile, as lengths have them; ``p50``, ``p95``, ... may stand without this."""
    max: Positive | None = None
    """Longest; draws above it are set to it."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, data: Any) -> Any:
        return gather_quantiles(data) if isinstance(data, dict | Seconds) else {"fixed": data}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        number = {"type": "number", "minimum": 0}
        short = {
            "type": "object",
            "properties": {"max": number},
            "patternProperties": {rf"^{QUANTILE.pattern}$": number},
            "minProperties": 2,
            "additionalProperties": False,
        }
        return {"anyOf": [number, short, handler(core)]}

    @model_validator(mode="after")
    def _one_law(self) -> Seconds:
        if sum(law is not None for law in (self.fixed, self.mean, self.quantiles)) != 1:
            raise invalid("a time needs one law", "Write a number, {mean: 20} or {p50: 5, p95: 60}.")
        if self.quantiles is not None:
            check_quantiles(self.quantiles)
        return self

    def draw(self, n: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
        """``n`` times."""
        if self.quantiles is not None:
            drawn = draw_quantiles(self.quantiles, n, rng)
        else:
            drawn = np.full(n, self.fixed) if self.mean is None else rng.exponential(self.mean, n)
        return drawn if self.max is None else np.minimum(drawn, self.max)


NO_TIME = Seconds(fixed=0.0)
