"""What a GPU costs an hour: a small dated file, which is the user's to change."""

from __future__ import annotations

import datetime
from pathlib import Path

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Model, Positive, parse
from servecast.sim.inputs.yaml_file import read_yaml
from servecast.sim.scenario.scenario import shipped_folder


class Prices(Model):
    """The file: hourly prices by the GPU's name, in one currency, as of a date."""

    date: datetime.date
    currency: str
    gpu_hour_cost: dict[str, Positive]

    def of(self, gpu: str, source: str) -> float:
        """The price of a GPU, by its name in any case.

        Raises:
            InputError: the file, which is called ``source``, has none.
        """
        known = {name.casefold(): price for name, price in self.gpu_hour_cost.items()}
        if gpu.casefold() not in known:
            fix = (
                f"Copy the file, add what one costs an hour, and give it as --prices. It has "
                f"{', '.join(self.gpu_hour_cost)}."
            )
            raise InputError(f"there is no price for {gpu!r}", where=f"{source}: gpu_hour_cost", fix=fix)
        return known[gpu.casefold()]


def read_prices(path: Path | str | None) -> tuple[Prices, str]:
    """The prices of a file, without one those that are shipped, and the file's name.

    Raises:
        InputError: it cannot be read, or is no list of prices.
    """
    path = shipped_folder() / "gpus" / "prices.yaml" if path is None else Path(path)
    if not path.is_file():
        raise InputError("there is no such file", where=f"--prices {path}", fix="Check the path.")
    return parse(Prices, read_yaml(path), source=str(path)), str(path)
