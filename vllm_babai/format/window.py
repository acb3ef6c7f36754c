"""Windows: the rows × columns of a stored matrix that one rank takes."""


def within(window: slice | None, size: int, axis: str) -> slice:
    """A window of one axis, `row` or `column`; None stands for the whole axis. Raises ValueError when it leaves it."""
    window = slice(0, size) if window is None else window
    if not 0 <= window.start <= window.stop <= size:
        raise ValueError(f"{axis} window {window.start}…{window.stop} leaves a matrix of {size} {axis}s")
    return window
