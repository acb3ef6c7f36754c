"""The model card that a checkpoint gets, and what `babai eval --card` adds to it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from vllm_babai.errors import QuantizationError
from vllm_babai.offline import QuantizeOptions, quantize
from vllm_babai.offline.card import command_line, describe_base, note_evaluation
from vllm_babai.offline.model.checkpoint import open_checkpoint

COMPARED = {"original_perplexity": 9.0, "loss": 0.012, "loss_error": 0.001, "divergence": 0.02}
EVALUATION = {
    "data": "text.txt",
    "windows": 4,
    "window": 64,
    "perplexity": 9.5,
    "comparison": COMPARED | {"divergence_error": 0.002, "agreement": 0.9},
}


@pytest.fixture(scope="module")
def quantized(
    save_random_llama: Callable[..., Path], short_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("card")
    model = save_random_llama(folder / "tiny", num_hidden_layers=1)
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\ntags: [mine]\n---\n# Tiny\n")
    options = QuantizeOptions(bits=3, calibration=str(short_text), samples=2, sequence_length=32, ignore=["down_proj"])
    return quantize(model, folder / "out", options)


def test_card_tells_what_it_is(quantized: Path) -> None:
    card = ModelCard.load(quantized / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.language == ["en"]
    assert card.data.tags == ["babai", "quantized", "ssqr"]
    assert card.data.base_model is None  # a folder of one's own is no link
    assert "# tiny, SSQR, dense + sparse" in card.content
    assert "babai quantize tiny OUT --format ssqr --bits 3" in card.content
    assert "--ignore down_proj" in card.content
    assert str(quantized.parent) not in card.content
    assert "Not measured yet" in card.content


def test_an_evaluation_is_noted_once(quantized: Path) -> None:
    for loss in (0.5, 0.012):
        note_evaluation(quantized, EVALUATION | {"comparison": EVALUATION["comparison"] | {"loss": loss}})
    text = (quantized / "README.md").read_text()
    assert (
        "| text.txt, 4 windows of 64 tokens | 9.5000 | 9.0000 | 0.01200 ± 0.00100 | 0.02000 ± 0.00200 | 90.00% |"
        in text
    )
    assert "0.50000" not in text
    assert "Not measured yet" not in text


def test_a_report_of_an_older_version_is_refused(quantized: Path, tmp_path: Path) -> None:
    for name in ("config.json",):
        (tmp_path / name).write_bytes((quantized / name).read_bytes())
    (tmp_path / "babai_report.json").write_text("{}")
    with pytest.raises(QuantizationError, match="quantize again"):
        note_evaluation(tmp_path, EVALUATION)
    assert (tmp_path / "babai_report.json").read_text() == "{}"


def test_a_model_of_the_hub_is_linked(quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--org--name" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((quantized.parent / "tiny" / name).read_bytes())
    about = describe_base(open_checkpoint(folder))
    assert (about["name"], about["on_hub"], about["card"]) == ("org/name", True, {})


def test_command_line_says_what_is_no_default() -> None:
    options = QuantizeOptions(format="hptq", rate=2.125, column_steps=False, calibration="/home/me/my text.txt")
    assert command_line("org/name", options.to_dict()) == (
        "babai quantize org/name OUT --format hptq --rate 2.125 --no-column-steps --calibration 'my text.txt'"
    )
