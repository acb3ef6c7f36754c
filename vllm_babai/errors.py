"""The two exceptions that users see. The command line shows both in one line, without a traceback."""


class FormatError(ValueError):
    """A stored tensor is truncated, corrupt, of an unknown version, or does not fit its linear."""


class QuantizationError(RuntimeError):
    """Bad input, or a step that cannot go on. The message names the linear or option and says what to do."""
