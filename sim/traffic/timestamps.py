"""Points in time as traces write them: dates with or without a zone, and numbers of some unit."""

from __future__ import annotations

import datetime
import math
import re

_DATE = re.compile(
    r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d(?::\d\d)?)(?:[.,](\d+))?\s*(?:(Z|UTC)|([+-])(\d\d):?(\d\d)?)?",
    re.IGNORECASE,
)
_EPOCH = datetime.datetime(1970, 1, 1)
_UNITS = ((1e17, 1e-9, "nanoseconds"), (1e14, 1e-6, "microseconds"), (1e11, 1e-3, "milliseconds"))

DateNs = tuple[int, str | None]
"""Nanoseconds since 1970 in UTC, and the zone as written, None without one."""


def read_date(text: str) -> DateNs | None:
    """A date and time, to the nanosecond ("2023-11-16 18:17:03.9799600", "2024-05-10T00:00:00+02:00");
    None for what is none. Without a zone it is taken as UTC."""
    match = _DATE.fullmatch(text.strip())
    if match is None:
        return None
    day, clock, fraction, utc, sign, hours, minutes = match.groups()
    try:
        since = datetime.datetime.fromisoformat(f"{day}T{clock}") - _EPOCH
    except ValueError:
        return None
    ns = (since.days * 86_400 + since.seconds) * 10**9 + int((fraction or "0")[:9].ljust(9, "0"))
    if sign is None:
        return ns, "+00:00" if utc else None
    offset_s = (int(hours) * 60 + int(minutes or 0)) * 60 * (-1 if sign == "-" else 1)
    return ns - offset_s * 10**9, f"{sign}{hours}:{minutes or '00'}"


def read_number(value: object) -> int | float | None:
    """A number, or text that is one; None for anything else. Whole numbers of 64 bits stay exact."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        whole = isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdecimal())
        number = int(value) if whole else float(value)
    except ValueError:
        return None
    return number if abs(number) < 2**63 else math.copysign(math.inf, number > 0 or -1)


def unit_of(number: float) -> tuple[float, str]:
    """Seconds in the unit of a time whose unit is not known, and its name: numbers from 1e11 on can only be
    milliseconds, microseconds or nanoseconds since 1970, smaller ones are taken as seconds."""
    return next(((s, name) for least, s, name in _UNITS if number >= least), (1.0, "seconds"))
