"""What a user of this package is meant to see: servecast's InputError, or its like on a bare machine."""

try:
    from servecast.sim.inputs.errors import InputError as MeasureError
except ImportError:

    class MeasureError(ValueError):  # type: ignore[no-redef]
        """A measurement that cannot be made or read: what, where, and what to do about it.

        Args:
            what: what is wrong, with the offending value. where: file, flag or process. fix: what to do.
        """

        def __init__(self, what: str, where: str, fix: str) -> None:
            super().__init__(what, where, fix)
            self.what, self.where, self.fix = what, where, fix

        def __str__(self) -> str:
            return f"{self.where}: {self.what}. {self.fix}"


__all__ = ["MeasureError"]
