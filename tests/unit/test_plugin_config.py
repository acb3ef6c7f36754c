"""`quantization_config` in vLLM: registration, which layers are quantized and how, errors that say what to do."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
from vllm.model_executor.models.utils import WeightsMapper

import vllm_babai
from vllm_babai.format import CheckpointConfig, FormatError, LayerScheme
from vllm_babai.plugin.config import BabaiConfig
from vllm_babai.plugin.linear import BabaiLinearMethod
from vllm_babai.plugin.residency import RESIDENCIES

BUNDLED = Path(__file__).parents[2] / "deploy" / "demo" / "stdlib-6m"
LAYER = "model.layers.0.self_attn"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        yield


@pytest.fixture
def linear() -> LinearBase:
    return LinearBase(16, 16, disable_tp=True)


def config_of(**fields: object) -> BabaiConfig:
    config = BabaiConfig.from_config(CheckpointConfig(**{"format": "ssqr", "bits": 4, **fields}).to_dict())
    config.packed_modules_mapping = FUSED
    return config


def test_register_is_idempotent() -> None:
    vllm_babai.register()
    vllm_babai.register()
    assert QUANTIZATION_METHODS.count("babai") == 1
    assert get_quantization_config("babai") is BabaiConfig


def test_config_is_picklable() -> None:
    config = config_of(ignore=["lm_head"])
    again = pickle.loads(pickle.dumps(config))
    assert again.checkpoint == config.checkpoint
    assert again.packed_modules_mapping == FUSED


def test_model_that_is_not_quantized() -> None:
    with pytest.raises(ValueError, match="babai quantize MODEL OUT --format ssqr --bits 4"):
        get_quantization_config("babai")()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 9, "format_version is 9"),
        ("bits", 6, "bits of .* is 6"),
        ("format", "gguf", "format is 'gguf'"),
    ],
)
def test_unreadable_checkpoint(field: str, value: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        BabaiConfig.from_config({**CheckpointConfig("ssqr", 4).to_dict(), field: value})


def test_scheme_of_a_layer(linear: LinearBase) -> None:
    config = config_of(overrides={f"{LAYER}.o_proj": {"bits": 8}})
    for name, bits in (("o_proj", 8), ("qkv_proj", 4)):
        method = config.get_quant_method(linear, f"{LAYER}.{name}")
        assert isinstance(method, BabaiLinearMethod)
        assert method.reader.scheme == LayerScheme(bits)


@pytest.mark.parametrize("residency", ["packed", "coded"])
def test_residency(linear: LinearBase, residency: str) -> None:
    stored = config_of(format="hptq", bits=None, residency=residency)
    overridden = config_of(format="hptq", bits=None)
    overridden.maybe_update_config("model", hf_config=PreTrainedConfig(babai_residency=residency))
    for config in (stored, overridden):
        config.maybe_update_config("model", hf_config=PreTrainedConfig())
        method = config.get_quant_method(linear, "model.proj")
        assert method.reader.residency == residency
        assert method.residency is RESIDENCIES[residency]


def test_residency_that_does_not_fit() -> None:
    with pytest.raises(FormatError, match="residency is 'disk'"):
        config_of(format="hptq").maybe_update_config("model", hf_config=PreTrainedConfig(babai_residency="disk"))
    with pytest.raises(FormatError, match="'coded' is for checkpoints of format 'hptq'"):
        config_of().maybe_update_config("model", hf_config=PreTrainedConfig(babai_residency="coded"))


def test_override_of_fused_linears(linear: LinearBase) -> None:
    config = config_of(overrides={f"{LAYER}.{name}": {"bits": 3} for name in FUSED["qkv_proj"]})
    assert config.get_quant_method(linear, f"{LAYER}.qkv_proj").reader.scheme.bits == 3


@pytest.mark.parametrize(
    "fields", [{"overrides": {f"{LAYER}.k_proj": {"bits": 8}}}, {"ignore": [f"{LAYER}.k_proj"]}], ids=str
)
def test_fused_linears_must_share_a_scheme(linear: LinearBase, fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{LAYER}.qkv_proj: .*{LAYER}.q_proj: .*{LAYER}.k_proj: .*{LAYER}.v_proj: "):
        config_of(**fields).get_quant_method(linear, f"{LAYER}.qkv_proj")


def test_ignored_layers_stay_as_they_are(linear: LinearBase) -> None:
    config = config_of(ignore=[f"{LAYER}.o_proj", *(f"{LAYER}.{name}" for name in FUSED["qkv_proj"])])
    for name in ("o_proj", "qkv_proj"):
        assert isinstance(config.get_quant_method(linear, f"{LAYER}.{name}"), UnquantizedLinearMethod)
    assert isinstance(config.get_quant_method(linear, f"{LAYER}.o_proj.more"), BabaiLinearMethod)


def test_embeddings_are_left_to_vllm() -> None:
    assert config_of().get_quant_method(torch.nn.Embedding(4, 4), "lm_head") is None


def test_names_follow_the_model(linear: LinearBase) -> None:
    config = config_of(ignore=["model.lm.o_proj"], overrides={"model.lm.up_proj": {"bits": 8}})
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.checkpoint.ignore == ["language_model.model.lm.o_proj"]
    assert config.checkpoint.overrides == {"language_model.model.lm.up_proj": {"bits": 8}}


def test_classes_that_do_not_say_what_they_fuse(linear: LinearBase) -> None:
    config = config_of(overrides={f"{LAYER}.{name}": {"bits": 3} for name in FUSED["qkv_proj"]})
    config.packed_modules_mapping = {}
    assert config.get_quant_method(linear, f"{LAYER}.qkv_proj").names == [f"{LAYER}.{n}" for n in FUSED["qkv_proj"]]
    stored_fused = config_of(overrides={f"{LAYER}.qkv_proj": {"bits": 3}})
    stored_fused.packed_modules_mapping = {}
    assert stored_fused.get_quant_method(linear, f"{LAYER}.qkv_proj").names == [f"{LAYER}.qkv_proj"]


@pytest.mark.parametrize(
    ("layer", "quantized"),
    [
        ("language_model.model.layers.0.self_attn.qkv_proj", True),
        ("language_model.model.layers.1.mlp.down_proj", True),
        ("language_model.model.layers.1.mlp.gate", False),  # a router, which the checkpoint names
        ("language_model.model.layers.11.mlp.down_proj", False),  # an MTP layer after the two blocks
        ("visual.blocks.0.attn.qkv", False),
        ("multi_modal_projector.linear_1", False),
        ("mtp.layers.0.mlp.down_proj", False),
        ("language_model.lm_head", False),
    ],
)
def test_scope(layer: str, quantized: bool, linear: LinearBase) -> None:
    blocks = [f"model.language_model.layers.{index}" for index in range(2)]
    config = config_of(scope=blocks, ignore=["lm_head", f"{blocks[1]}.mlp.gate"])
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."}))
    assert isinstance(config.get_quant_method(linear, layer), BabaiLinearMethod) == quantized


@pytest.mark.parametrize(
    ("layer", "stored", "bits"),
    [
        ("model.layers.1.qkv_proj", [f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")], 4),
        ("model.layers.0.mixer.in_proj", ["model.layers.0.mamba.in_proj"], 3),
        ("model.layers.1.mixer.in_proj", None, None),  # the checkpoint ignores it
        ("model.layers.0.mixer.conv1d", None, None),  # no linear that is quantized anywhere
        ("model.layers.0.feed_forward.up_proj", None, None),  # that of which of two?
    ],
)
def test_layers_that_vllm_calls_otherwise(layer: str, stored: list[str], bits: int, linear: LinearBase) -> None:
    kinds = ["mamba.in_proj", "mlp.up_proj", "mlp2.up_proj", *(f"self_attn.{name}" for name in FUSED["qkv_proj"])]
    blocks = [f"model.layers.{index}" for index in range(2)]
    overrides = {"model.layers.0.mamba.in_proj": {"bits": 3}}
    config = config_of(scope=blocks, linears=kinds, overrides=overrides, ignore=["model.layers.1.mamba.in_proj"])
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "model."}))
    method = config.get_quant_method(linear, layer)
    if stored is None:
        assert isinstance(method, UnquantizedLinearMethod)
    else:
        assert (method.names, method.reader.scheme.bits) == (stored, bits)


def test_names_that_the_model_changes_are_the_checkpoints_again(linear: LinearBase) -> None:
    config = config_of(scope=["backbone.layers.0"], linears=["mixer.up_proj"])
    config.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"backbone": "model"}, orig_to_new_substr={"mixer": "mlp"})
    )
    assert config.get_quant_method(linear, "model.layers.0.mlp.up_proj").names == ["backbone.layers.0.mixer.up_proj"]
    assert pickle.loads(pickle.dumps(config)).names.find("model.layers.0.up_proj") == config.names.find(
        "model.layers.0.mlp.up_proj"
    )


def test_a_head_outside_of_the_scope_is_quantized_where_it_has_an_override() -> None:
    checkpoint = CheckpointConfig("ssqr", 4, scope=["model.layers.0"], overrides={"lm_head": {"bits": 5}})
    assert checkpoint.is_quantized("lm_head")
    assert not checkpoint.is_quantized("model.embed_tokens")


def compile_key(folder: Path, overrides: dict[str, str], **fields: object) -> str:
    """What vLLM names compiled graphs by, for a checkpoint in this folder with these fields in quantization_config."""
    config = json.loads((BUNDLED / "config.json").read_text())
    config["quantization_config"] = CheckpointConfig("hptq").to_dict() | fields
    (folder / "config.json").write_text(json.dumps(config))
    vllm_babai.register()
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, hf_overrides=overrides)
    return model.compute_hash()  # the part of VllmConfig.compute_hash that knows the model


def test_weights_and_residency_are_in_the_key_of_compiled_graphs(tmp_path: Path) -> None:
    """Quantized again to the same folder, a checkpoint of the same format must not meet graphs made for the old one."""
    first = compile_key(tmp_path, {}, digest="0" * 64)
    assert first == compile_key(tmp_path, {}, digest="0" * 64)
    assert first != compile_key(tmp_path, {}, digest="1" * 64)
    assert first != compile_key(tmp_path, {"babai_residency": "coded"}, digest="0" * 64)


def test_one_group_of_state_space_heads_on_several_ranks() -> None:
    with pytest.raises(NotImplementedError, match=r"^model\.layers\.0\.mamba\.in_proj: .*--tensor-parallel-size 1"):
        ColumnParallelLinear(
            64, 96, quant_config=config_of(), prefix="model.layers.0.mamba.in_proj", tp_rank=0, tp_size=2
        )
