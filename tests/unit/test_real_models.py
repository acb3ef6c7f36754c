"""The study of real models: what it keeps is what is computed, and its table and plot say what was measured."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from quality import Material
from real_models import CODE, GPTQ, Row, Study, check_work, evaluated, kept_predictions, plot, table_of

from vllm_babai.offline.model.dense import load_dense
from vllm_babai.offline.tools.evaluate import evaluation_windows, predictions

WINDOWS, LENGTH = 2, 48


@pytest.fixture
def study(bundled_model: Path, short_text: Path, tmp_path: Path) -> Study:
    material = Material(bundled_model, short_text, short_text, 2, WINDOWS, LENGTH)
    work = tmp_path / "work"
    work.mkdir()
    (work / "ssqr-3.1").symlink_to(bundled_model)  # the original in place of a quantized one
    return Study(material, {CODE: short_text}, work, None)


def test_predictions_of_the_original_are_kept_as_computed(study: Study) -> None:
    model, texts = study.material.model, study.texts
    windows = evaluation_windows(model, texts[CODE], LENGTH, WINDOWS)
    folder = study.work / "original"
    for _ in range(2):  # computed, then read
        kept = list(kept_predictions(folder, model, windows))
        direct = list(predictions(load_dense(model, torch.device("cpu")), windows))
        assert len(kept) == len(direct)
        assert all(torch.equal(*pair) for pairs in zip(kept, direct, strict=True) for pair in zip(*pairs, strict=True))


def test_a_row_is_compared_tabulated_and_drawn(study: Study, tmp_path: Path) -> None:
    row = Row("ssqr", 3.1, 3.1, 4_200_000, 0.01, 12.0, {})
    found = evaluated(row, study)
    assert found[CODE]["loss"] == found[CODE]["agreement_error"] == 0
    assert found[CODE]["agreement"] == 1
    peer = found[CODE] | {"divergence": 0.5, "divergence_error": 0.01}
    ours = found[CODE] | {"divergence": 0.1}
    rows = [
        Row(**(asdict(row) | {"texts": {CODE: ours}})),
        Row(GPTQ, 3, 3.25, 4_300_000, None, 3.0, {CODE: peer}),
    ]
    table = table_of(rows)
    assert "| SSQR | 3.100 | 4.2 | 12 | 0.010 |" in table
    assert "| 3.250 | 4.3 | 3 |  |" in table
    assert "0.5000 ± 0.0100" in table
    plot(rows, "a model", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_a_work_folder_is_for_one_study(study: Study) -> None:
    check_work(study)
    check_work(study)
    other = Study(study.material, {}, study.work, None)
    with pytest.raises(SystemExit, match="another --work"):
        check_work(other)
