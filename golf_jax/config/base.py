"""The one error users see, and the cap."""

CAP_BYTES = 16_000_000  # artifact cap of the challenge, decimal, code + model


class GolfError(ValueError):
    """A mistake of the user, or bad input, told in one line that names the place, the field and the fix."""


def check(ok: bool, message: str) -> None:
    if not ok:
        raise GolfError(message)
