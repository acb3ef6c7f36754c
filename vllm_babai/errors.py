"""The two exceptions that users meet; both are shown to them without a traceback."""


class FormatError(ValueError):
    """A stored tensor is truncated, corrupt, of an unknown version, or does not fit its layer."""


class QuantizationError(RuntimeError):
    """Bad input or a step that cannot go on; the message names the layer or argument and says what to do."""
