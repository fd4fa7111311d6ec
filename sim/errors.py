"""The one exception that a user is meant to see."""


class InputError(ValueError):
    """Input that is wrong: what, where, and what to do about it.

    Args:
        what: what is wrong, with the offending value.
        where: file and field path, or the flag ("scenario.yaml: workload.arrivals.request_rate").
        fix: what to do.

    The command line prints ``str(error)`` and exits with code 2.
    """

    def __init__(self, what: str, *, where: str, fix: str) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(f"{where}: {what}. {fix}")

    def __reduce__(self) -> tuple[object, ...]:  # so that it crosses process pools
        return (_rebuild, (self.what, self.where, self.fix))


def _rebuild(what: str, where: str, fix: str) -> InputError:
    return InputError(what, where=where, fix=fix)
