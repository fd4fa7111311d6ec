"""The one exception that a user is meant to see."""


class InputError(ValueError):
    """Input that is wrong: what, where, and what to do about it.

    Args:
        what: what is wrong, with the offending value.
        where: file and field path, or the flag ("scenario.yaml: workload.arrivals.request_rate").
        fix: what to do.

    The command line prints ``str(error)`` and exits with code 2.
    """

    def __init__(self, what: str, where: str, fix: str) -> None:
        super().__init__(what, where, fix)  # all of it: SimPy and process pools rebuild it from its args
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.fix}"


def reason(error: Exception) -> str:
    """What went wrong: of the system's errors without their number, and the path that ``where`` has."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
