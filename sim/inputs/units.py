"""Engine time is an integer number of picoseconds; this is the one place that converts it."""

PICOSECONDS = 1_000_000_000_000


def to_ps(seconds: float) -> int:
    """Seconds to picoseconds, rounded once."""
    return round(seconds * PICOSECONDS)


def to_seconds(ps: int) -> float:
    """Picoseconds to seconds."""
    return ps / PICOSECONDS
