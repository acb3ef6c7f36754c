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
    assert raw["format_version"] == 2
    assert CheckpointConfig.from_dict(raw) == CONFIG


def test_every_format_has_its_name_and_a_dtype_for_each_stored_tensor() -> None:
    assert tuple(FORMATS) == ("ssqr", "hptq", "trellis")
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
        ({"format_version": 3}, r"format_version is 3; this version of vllm-babai reads \(1, 2\)"),
        ({"format_version": True}, "format_version is True"),
        ({"format_version": 1.0}, r"format_version is 1\.0"),
        ({"format": None}, "format is None; it must be a string"),
        ({"format": ["ssqr"]}, r"format is \['ssqr'\]; it must be a string"),
        ({"bits": 4.0}, r"bits is 4\.0; it must be an integer or null"),
        ({"bits": "4"}, "bits is '4'; it must be an integer or null"),
        ({"bits": True}, "bits is True; it must be an integer or null"),
        ({"bits": [4]}, r"bits is \[4\]; it must be an integer or null"),
        ({"group_size": None}, "group_size is None; it must be an integer"),
        ({"group_size": 128.0}, r"group_size is 128\.0; it must be an integer"),
        ({"ignore": "lm_head"}, "ignore is 'lm_head'; it must be a list of strings"),
        ({"ignore": None}, "ignore is None; it must be a list of strings"),
        ({"ignore": [3]}, r"ignore is \[3\]; it must be a list of strings"),
        ({"overrides": None}, "overrides is None; it must be an object of objects"),
        ({"overrides": ["lm_head"]}, r"overrides is \['lm_head'\]; it must be"),
        ({"overrides": {"lm_head": 5}}, "overrides is {'lm_head': 5}; it must be an object of objects"),
        ({"overrides": {"up_proj": {"bits": 8.0}}}, r"bits of up_proj is 8\.0; it must be an integer or null"),
        ({"overrides": {"up_proj": {"group_size": "128"}}}, "group_size of up_proj is '128'; it must be an integer"),
        ({"residency": 1}, "residency is 1; it must be a string"),
        ({"digest": "abc"}, "digest is 'abc'; it must be 64 hexadecimal digits or null"),
        ({"digest": 7}, "digest is 7; it must be 64 hexadecimal digits or null"),
        ({"checksums": ["norm"]}, r"checksums is \['norm'\]; it must be an object of strings of 8 hexadecimal digits"),
        ({"checksums": {"norm": "abc"}}, "checksums is {'norm': 'abc'}; it must be an object of strings of 8 hex"),
        ({"format_version": None}, "format_version is None"),
        ({"bitz": 4}, r"unknown fields \['bitz'\]"),
        ({"residency": "disk"}, "residency is 'disk'; this version knows"),
        ({"residency": "coded"}, "'coded' is for checkpoints of format 'hptq'; this one is 'ssqr'"),
        ({"bits": 6}, "bits of the checkpoint is 6"),
        ({"overrides": {"model.layers.0.mlp.up_proj": {"bits": 7}}}, "bits of model.layers.0.mlp.up_proj is 7"),
        ({"format": "gguf"}, r"format is 'gguf'; this version reads \('ssqr', 'hptq', 'trellis'\)"),
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


@pytest.mark.parametrize("raw", [None, "babai", ["babai"], 4])
def test_a_configuration_that_is_no_object_is_refused(raw: Any) -> None:
    with pytest.raises(FormatError, match=r"quantization_config is .*; it must be an object"):
        CheckpointConfig.from_dict(raw)


def test_version_1_is_read() -> None:
    raw = CONFIG.to_dict() | {"format_version": 1}
    del raw["digest"], raw["checksums"]
    assert CheckpointConfig.from_dict(raw) == CONFIG
