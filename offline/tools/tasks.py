"""Tasks of the language model evaluation harness, run on a checkpoint, dense or quantized."""

from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.calibration import load_tokenizer
from vllm_babai.offline.model.checkpoint import TRUST_REMOTE_CODE, open_checkpoint
from vllm_babai.offline.model.dense import load_dense


@dataclass(frozen=True)
class Score:
    """What a task measured, with its standard error (None where the harness gives none)."""

    task: str
    metric: str
    value: float
    error: float | None


def run_tasks(
    model: str | Path,
    tasks: list[str],
    *,
    task_folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: torch.device | None = None,
) -> list[Score]:
    """Run tasks of the harness, by their names there, on a checkpoint in float32.

    task_folder: where to find tasks of one's own, as the harness's `--include_path`. limit: of documents per task.
    Raises QuantizationError when the harness is not installed or knows no such task.
    """
    if limit is not None and limit < 1:
        raise QuantizationError(f"--limit must be 1 or more, not {limit}")
    if task_folder is not None and not task_folder.is_dir():
        raise QuantizationError(f"--task-folder: there is no folder {task_folder}")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise QuantizationError(f"--tasks needs lm-eval ({error}): pip install 'vllm-babai[eval]'") from error
    manager = TaskManager(include_path=str(task_folder) if task_folder else None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise QuantizationError(f"--tasks: lm-eval knows no {', '.join(unknown)}; `lm-eval ls tasks` lists its tasks")
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(open_checkpoint(model).folder)
    loaded = HFLM(
        pretrained=load_dense(model, device),
        tokenizer=tokenizer,
        batch_size=batch_size,
        trust_remote_code=TRUST_REMOTE_CODE,
    )
    found = simple_evaluate(loaded, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    return [score for task, measured in found["results"].items() for score in _scores(task, measured)]


def _scores(task: str, measured: dict[str, object]) -> list[Score]:
    """Metrics are keyed `name,filter` there, their errors `name_stderr,filter`."""
    scores = []
    for key, value in measured.items():
        name, _, kept = key.partition(",")
        if isinstance(value, float) and not name.endswith("_stderr"):
            error = measured.get(f"{name}_stderr,{kept}")
            metric = name if kept in ("", "none") else f"{name} ({kept})"
            scores.append(Score(task, metric, value, error if isinstance(error, float) else None))
    return scores
