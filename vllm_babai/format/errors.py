"""The one exception of the checkpoint format."""


class FormatError(ValueError):
    """A stored tensor is truncated, corrupt, of an unknown version, or does not fit its layer."""
