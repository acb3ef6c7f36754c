"""The one exception that the quantizer shows to its users without a traceback."""


class QuantizationError(RuntimeError):
    """Bad input or a step that cannot go on; the message names the layer or argument and says what to do."""
