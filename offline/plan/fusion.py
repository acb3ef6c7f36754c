"""Which linears vLLM makes one layer of; they must be stored with the same dense bits."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fused_with(linear: str) -> tuple[str, ...]:
    """Full names of the linears that are fused with this one, itself among them."""
    parent, _, own = linear.rpartition(".")
    for names in FUSED:
        if own in names:
            return tuple(f"{parent}.{name}" for name in names)
    return (linear,)
