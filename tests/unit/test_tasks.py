"""Tasks of the evaluation harness on a checkpoint, with a task made of local data."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from vllm_babai.offline import QuantizationError
from vllm_babai.offline.cli import app
from vllm_babai.offline.tools.tasks import run_tasks

QUESTIONS = [
    {"text": "import os\n\ndef name(path):\n    return os.path.", "choices": ["join", "zebra"], "answer": 0},
    {"text": "class A:\n    def __init__(", "choices": ["%%%", "self"], "answer": 1},
    {"text": "for i in ", "choices": ["range(10):", "))))"], "answer": 0},
    {"text": "try:\n    pass\nexcept ", "choices": ["ValueError", "0000"], "answer": 0},
]
TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (folder / "local_choice.yaml").write_text(TASK.format(data=data))
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def log_probability(model: Any, tokenizer: Any, context: str, choice: str) -> float:
    start = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    tokens = tokenizer(context + choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_p = torch.log_softmax(model(tokens).logits[0].double(), -1)
    return sum(float(log_p[i - 1, tokens[0, i]]) for i in range(start, tokens.shape[1]))


def test_accuracy_is_that_of_a_direct_computation(bundled_model: Path, tokenizer: Any, task_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(bundled_model, dtype=torch.float32).eval()
    right = [
        max((0, 1), key=lambda i: log_probability(model, tokenizer, q["text"], q["choices"][i])) == q["answer"]
        for q in QUESTIONS
    ]
    (score,) = run_tasks(bundled_model, ["local_choice"], task_folder=task_folder)
    assert (score.task, score.metric) == ("local_choice", "acc")
    assert score.value == pytest.approx(sum(right) / len(right))
    assert score.error is None or not math.isnan(score.error)


def test_an_unknown_task_is_named(bundled_model: Path, task_folder: Path) -> None:
    with pytest.raises(QuantizationError, match="no_such_task"):
        run_tasks(bundled_model, ["no_such_task"], task_folder=task_folder)


def test_the_command_prints_both_models(bundled_model: Path, task_folder: Path) -> None:
    options = ["--tasks", "local_choice", "--task-folder", str(task_folder), "--limit", "2", "--json"]
    result = CliRunner().invoke(app, ["eval", str(bundled_model), *options, "--against", str(bundled_model)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert found["tasks"] == found["original_tasks"]
    assert [score["task"] for score in found["tasks"]] == ["local_choice"]


def test_the_command_needs_something_to_measure(bundled_model: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(bundled_model)])
    assert isinstance(result.exception, QuantizationError)
    assert "--data" in str(result.exception) and "--tasks" in str(result.exception)
