"""Configuration (being written)."""


class GolfError(ValueError):
    """A mistake of the user, or bad input, told in one line that names the place, the field and the fix."""
