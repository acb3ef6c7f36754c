"""What vLLM makes of a model's linears: some become one layer, and some it cannot quantize.

Read off vLLM's model classes (0.32): `tests/unit/test_plugin_architectures.py` builds them on the meta device with a
configuration that notes which layers ask for a method, and compares.
"""

# Linears that become one layer, by the last part of their names. Their widths have to be equal. Where some class does
# not fuse them, equal widths do no harm.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),  # LFM-2
    ("q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek's latent attention
    ("in_proj_qkv", "in_proj_z"),  # linear attention of Qwen3.5
    ("in_proj_b", "in_proj_a"),
)
# Linears without a quantized form, by the class that config.json names and the end of their names: those built without
# a method, those whose weight the class's loader rearranges (BLOOM, Falcon) or that the class reads itself (Gemma-3n).
MAMBA_1 = (".in_proj", ".x_proj", ".dt_proj", ".out_proj")
DENSE = {
    "BloomForCausalLM": (".self_attention.query_key_value",),
    "FalconForCausalLM": (".self_attention.query_key_value",),
    "FalconH1ForCausalLM": (".mamba.in_proj", ".mamba.out_proj"),
    "FalconMambaForCausalLM": tuple(f".mixer{name}" for name in MAMBA_1),
    "Gemma3nForCausalLM": (".altup.correction_coefs", ".altup.prediction_coefs", ".altup.modality_router"),
    "Gemma3nForConditionalGeneration": (".altup.correction_coefs", ".altup.prediction_coefs", ".altup.modality_router"),
    "JambaForCausalLM": tuple(f".mamba{name}" for name in MAMBA_1),
    "MambaForCausalLM": tuple(f".mixer{name}" for name in MAMBA_1),
    "MiniCPM3ForCausalLM": (".self_attn.q_a_proj",),
}

# Linears that tell which experts a token goes to, or how much a shared expert counts: a few rows each, on which all
# else depends.
ROUTERS = (".gate", ".gate.wg", ".router", ".router.proj", ".shared_expert_gate")


def fused_with(linear: str) -> tuple[str, ...]:
    """Full names of the linears that are fused with this one, itself among them."""
    parent, _, own = linear.rpartition(".")
    for names in FUSED:
        if own in names:
            return tuple(f"{parent}.{name}" for name in names)
    return (linear,)


def stays_dense(linear: str, architecture: str) -> bool:
    """Whether vLLM's class of that name has no quantization method for the linear, as none has for routers."""
    return linear.endswith((*ROUTERS, *DENSE.get(architecture, ())))
