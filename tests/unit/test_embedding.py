"""`--embedding`: the rows that tokens are looked up in, quantized; where they make the logits, too, once for both."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TEXT
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma2Config, Gemma3nTextConfig, LlamaConfig, PreTrainedConfig

from vllm_babai.format import FORMATS, CheckpointConfig, FormatError, integer_range
from vllm_babai.offline import QuantizationError, QuantizeOptions, quantize
from vllm_babai.offline.fit import measure
from vllm_babai.offline.model import walk
from vllm_babai.offline.model.calibration import calibration_tokens
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.dense import load_dense, stored_linears
from vllm_babai.offline.model.streamed import StreamedModel
from vllm_babai.offline.tools.convert import convert
from vllm_babai.offline.tools.evaluate import evaluate
from vllm_babai.offline.tools.inspect import inspect

CPU = torch.device("cpu")
NAME = "model.embed_tokens"
BITS = {"ssqr": 4, "hptq": 4.5}
TIED = {
    "llama": LlamaConfig(**TEXT | {"tie_word_embeddings": True}),
    "gemma2": Gemma2Config(**TEXT | {"tie_word_embeddings": True}, sliding_window=16),
}


def options(text: Path, **changed: Any) -> QuantizeOptions:
    common = {"calibration": str(text), "samples": 4, "sequence_length": 64, "sensitivity": False}
    return QuantizeOptions(**{**common, **changed})


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, save_random_llama: Callable[..., Path]) -> Path:
    return save_random_llama(tmp_path_factory.mktemp("model") / "untied", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, save_random_model: Callable[[PreTrainedConfig, Path], Path]) -> Path:
    return save_random_model(TIED["llama"], tmp_path_factory.mktemp("model") / "tied")


@pytest.fixture(scope="module", params=list(BITS))
def quantized(
    request: pytest.FixtureRequest, untied: Path, short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Checkpoint of an untied model in a folder called like its format."""
    form = request.param
    chosen = options(short_text, format=form, embedding=BITS[form], rate=3, column_steps=False)
    return quantize(untied, tmp_path_factory.mktemp("quantized") / form, chosen)


def config_of(folder: Path) -> CheckpointConfig:
    return CheckpointConfig.from_dict(json.loads((folder / "config.json").read_text())["quantization_config"])


def weight_of(folder: Path) -> Tensor:
    return load_dense(folder, CPU).get_input_embeddings().weight


def test_an_untied_embedding_is_rounded_row_by_row_in_a_file_of_its_own(quantized: Path, untied: Path) -> None:
    config = config_of(quantized)
    assert config.embedding == NAME
    assert config.overrides == {NAME: {"bits": 4} if quantized.name == "ssqr" else {}}
    assert "lm_head" in config.ignore
    own = set(load_file(quantized / "model-00003-of-00004.safetensors"))
    assert own == {f"{NAME}.{key}" for key in FORMATS[quantized.name].dtypes}
    assert f"{NAME}.weight" not in open_checkpoint(quantized).files
    point = next(weight for name, weight, _, _ in stored_linears(open_checkpoint(quantized)) if name == NAME)
    if quantized.name == "ssqr":  # to the nearest integer, but beyond the dense range, where an entry may cost too much
        scales, (low, high) = point.scales.float(), integer_range(BITS["ssqr"])
        targets = weight_of(untied) / scales
        dense = (targets.round() >= low) & (targets.round() <= high)
        assert ((point.integers - targets).abs()[dense] <= 0.501).all()
        assert dense.float().mean() > 0.9
    found = {linear.name: linear for linear in inspect(quantized).linears}[NAME]
    assert found.bits_per_weight == pytest.approx(BITS[quantized.name], rel=0.15)
    assert found.relative_error is not None
    assert found.relative_error < 0.02


def test_evaluation_and_conversion_read_it(quantized: Path, untied: Path, short_text: Path, tmp_path: Path) -> None:
    found = evaluate(quantized, short_text, window=64, samples=4, against=untied).comparison
    assert found is not None
    assert 0 < found.divergence < 0.1
    other = "hptq" if quantized.name == "ssqr" else "ssqr"
    there = convert(quantized, tmp_path / "there", other, torch.float32)
    back = convert(there, tmp_path / "back", quantized.name, torch.float32)
    assert config_of(there).embedding == NAME
    assert NAME in config_of(there).overrides
    name = "model-00003-of-00004.safetensors"
    assert (quantized / name).read_bytes() == (back / name).read_bytes()
    dense = convert(there, tmp_path / "dense", "dense", torch.float32)
    assert torch.equal(weight_of(dense), weight_of(quantized))
    with pytest.raises(QuantizationError, match=f"{NAME} is quantized|takes SSQR"):
        convert(quantized, tmp_path / "exported", "compressed-tensors", torch.float32)


@pytest.mark.parametrize("drift", [True, False])
def test_blocks_are_calibrated_on_what_is_looked_up(
    drift: bool, untied: Path, short_text: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    factorize = walk.factorize
    monkeypatch.setattr(walk, "factorize", lambda hessian, *rest: (seen.append(hessian), factorize(hessian, *rest))[1])
    out = quantize(untied, tmp_path / "out", options(short_text, embedding=2, drift=drift))
    model, inputs = load_dense(out, CPU), []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].flatten(0, 1))
    )
    model(calibration_tokens(tokenizer, str(short_text), 4, 64, seed=0))
    torch.testing.assert_close(seen[0], inputs[0].T @ inputs[0] / len(inputs[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", TIED)
def test_a_tied_pair_is_one_matrix_for_both(
    family: str, short_text: Path, tmp_path: Path, save_random_model: Callable[[PreTrainedConfig, Path], Path]
) -> None:
    source = save_random_model(TIED[family], tmp_path / "source")
    out = quantize(source, tmp_path / "out", options(short_text, embedding=4, lm_head=4, ignore=["."]))
    config = config_of(out)
    assert (config.embedding, list(config.overrides)) == (NAME, [NAME])
    assert "lm_head" not in config.ignore
    assert not {f"{NAME}.weight", "lm_head.weight"} & open_checkpoint(out).files.keys()
    model, original = load_dense(out, CPU), weight_of(source)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 0 < (model.lm_head.weight - original).norm() < 0.2 * original.norm()


def test_a_copy_of_the_head_that_a_tied_checkpoint_has_is_dropped(tied: Path, short_text: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in tied.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tied / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors[f"{NAME}.weight"].clone()}, source / "model.safetensors")
    out = quantize(source, tmp_path / "out", options(short_text, embedding=4, ignore=["."]))
    assert "lm_head.weight" not in open_checkpoint(out).files
    model = load_dense(out, CPU)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_an_interrupted_run_resumes_to_the_same_bytes(
    untied: Path, short_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(short_text, embedding=3)
    whole = quantize(untied, tmp_path / "whole", chosen)
    with monkeypatch.context() as patch:
        patch.setattr(StreamedModel, "load", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(untied, tmp_path / "out", chosen)
    assert (tmp_path / "out.partial" / "model-00003-of-00004.safetensors").is_file()
    resumed = quantize(untied, tmp_path / "out", chosen, resume=True)
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (resumed / path.name).read_bytes(), path.name


def test_sizes_count_it(quantized: Path, untied: Path, short_text: Path) -> None:
    form = quantized.name
    sizes = measure(untied, options(short_text, format=form, embedding=BITS[form]))
    of_blocks = [linear for linear in inspect(quantized).linears if linear.name != NAME]
    assert sizes.weights == sum(linear.rows * linear.columns for linear in of_blocks)
    made = open_checkpoint(quantized).bytes()
    assert sizes.kept + sum(linear.bytes for linear in of_blocks) == pytest.approx(made, rel=0.02)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"embedding": 6}, r"--embedding must be one of \(2, 3, 4, 5, 8\) in SSQR, not 6"),
        ({"format": "hptq", "embedding": 0.5}, "--embedding must be from 1 to 8, not 0.5"),
        ({"format": "trellis", "embedding": 4}, "--embedding must be left out with --format trellis"),
    ],
)
def test_bits_that_there_are_not_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        QuantizeOptions(**changed)


def test_a_tied_pair_has_one_number_of_bits(tied: Path, tmp_path: Path) -> None:
    for changed in ({"lm_head": 4}, {"lm_head": 4, "embedding": 5}):
        with pytest.raises(QuantizationError, match="head and embedding of this model: give both by --embedding 4"):
            quantize(tied, tmp_path / "out", QuantizeOptions(calibration="nowhere.txt", **changed))


def test_embeddings_for_each_layer_are_refused(
    tmp_path: Path, save_random_model: Callable[[PreTrainedConfig, Path], Path]
) -> None:
    sizes = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 4000, "num_kv_shared_layers": 0}
    source = save_random_model(Gemma3nTextConfig(**TEXT, **sizes, laurel_rank=8), tmp_path / "source")
    with pytest.raises(QuantizationError, match="Gemma3nForCausalLM looks tokens up in embed_tokens_per_layer, too"):
        quantize(source, tmp_path / "out", QuantizeOptions(calibration="nowhere.txt", embedding=4))


def test_a_configuration_without_its_scheme_is_refused() -> None:
    config = CheckpointConfig("ssqr", 4, overrides={NAME: {"bits": 5}}, embedding=NAME)
    assert CheckpointConfig.from_dict(config.to_dict()) == config
    assert "embedding" not in replace(config, embedding=None).to_dict()
    with pytest.raises(FormatError, match=f"embedding is '{NAME}', which overrides does not have"):
        CheckpointConfig.from_dict(config.to_dict() | {"overrides": {}})
