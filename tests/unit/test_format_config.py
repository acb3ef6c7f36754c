"""quantization_config: round trip, overrides, and an error for every field at fault."""

from dataclasses import fields
from typing import Any

import pytest

from vllm_babai.format import FORMATS, CheckpointConfig, FormatError, LayerScheme

CONFIG = CheckpointConfig(
    "ssqr", 4, 128, ignore=["lm_head"], overrides={"model.layers.0.mlp.down_proj": {"bits": 8, "group_size": -1}}
)


def test_round_trip() -> None:
    raw = CONFIG.to_dict()
    assert raw["quant_method"] == "babai"
    assert raw["format_version"] == 1
    assert CheckpointConfig.from_dict(raw) == CONFIG


def test_every_format_has_its_name_and_a_dtype_for_each_stored_tensor() -> None:
    assert tuple(FORMATS) == ("ssqr", "hptq")
    for name, form in FORMATS.items():
        assert form.name == name
        assert tuple(form.dtypes) == tuple(field.name for field in fields(form))  # type: ignore[arg-type]


def test_scheme_of_a_layer() -> None:
    assert CONFIG.scheme("model.layers.1.mlp.down_proj") == LayerScheme(4, 128)
    assert CONFIG.scheme("model.layers.0.mlp.down_proj") == LayerScheme(8, -1)


@pytest.mark.parametrize(("group_size", "groups"), [(-1, 1), (32, 8), (128, 2)])
def test_scales_per_row(group_size: int, groups: int) -> None:
    assert LayerScheme(4, group_size).groups(256) == groups


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq', not 'babai'"),
        ({"quant_method": None}, "quant_method is None"),
        ({"format_version": 2}, "format_version is 2; this version of vllm-babai reads 1"),
        ({"format_version": None}, "format_version is None"),
        ({"bitz": 4}, r"unknown fields \['bitz'\]"),
        ({"residency": "disk"}, "residency is 'disk'; this version knows"),
        ({"residency": "coded"}, "'coded' is for checkpoints of format 'hptq'; this one is 'ssqr'"),
        ({"bits": 6}, "bits of the checkpoint is 6"),
        ({"overrides": {"model.layers.0.mlp.up_proj": {"bits": 7}}}, "bits of model.layers.0.mlp.up_proj is 7"),
        ({"format": "gguf"}, r"format is 'gguf'; this version reads \('ssqr', 'hptq'\)"),
        ({"group_size": 100}, r"group_size of the checkpoint is 100; this version reads \(-1, 32, 64, 128\)"),
        ({"overrides": {"up_proj": {"group_size": 0}}}, "group_size of up_proj is 0"),
        (
            {"overrides": {"up_proj": {"bit": 4}}},
            r"up_proj has unknown fields \['bit'\]; known are \['bits', 'group_size'\]",
        ),
    ],
)
def test_a_field_at_fault_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        CheckpointConfig.from_dict(CONFIG.to_dict() | change)


@pytest.mark.parametrize("missing", ["quant_method", "format_version", "format", "bits"])
def test_a_missing_field_is_named(missing: str) -> None:
    raw = CONFIG.to_dict()
    del raw[missing]
    with pytest.raises(FormatError, match=missing):
        CheckpointConfig.from_dict(raw)
