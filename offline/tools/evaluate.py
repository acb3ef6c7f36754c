"""Perplexity of a checkpoint, and how far its next-token distributions are from the original's."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.calibration import load_tokenizer, read_texts
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.dense import load_dense
from vllm_babai.offline.model.skeleton import load_config, model_positions
from vllm_babai.progress import counting_progress

BATCH_TOKENS = 2048  # a choice: log-probabilities over the vocabulary are the largest tensors here


@dataclass(frozen=True)
class Comparison:
    """A model against the original on the same tokens; means with their standard errors over windows.

    loss: difference of negative log-likelihood, nats per token, paired. divergence: KL(original ‖ model) of the
    next-token distributions, nats. agreement: share of positions with the same most likely token.
    """

    original_perplexity: float
    loss: float
    loss_error: float
    divergence: float
    divergence_error: float
    agreement: float


@dataclass(frozen=True)
class Evaluation:
    """perplexity: exp of `nll`, the mean negative log-likelihood in nats per predicted token; `nll_error` is its
    standard error over windows. position_nll: mean by position in the window, in eight equal parts.
    """

    perplexity: float
    nll: float
    nll_error: float
    position_nll: list[float]
    tokens: int
    windows: int
    window: int
    comparison: Comparison | None = None


def evaluation_windows(model: str | Path, data: str | Path, window: int, samples: int) -> Tensor:
    """Windows of `window` tokens of the text, int64 [windows, window]; `samples` of them spread evenly, or all (0).

    Documents are joined without a separator. Raises QuantizationError when there is less than one window of text, or a
    number that makes no sense.
    """
    if window < 2:
        raise QuantizationError(f"--window must be 2 or more, not {window}: a token is predicted from those before it")
    if samples < 0:
        raise QuantizationError(f"--samples must be 0 (all windows) or more, not {samples}")
    tokenizer = load_tokenizer(open_checkpoint(model).folder)
    text = "".join(read_texts(str(data), tokenizer))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = len(tokens) // window
    if whole < 1:
        raise QuantizationError(f"{data} has {len(tokens)} tokens, less than one window of {window}: give more text")
    windows = torch.tensor(tokens[: whole * window]).view(whole, window)
    return windows[:: max(1, whole // samples)][:samples] if samples else windows


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    window: int = 512,
    samples: int = 0,
    against: str | Path | None = None,
    device: torch.device | None = None,
) -> Evaluation:
    """Evaluate a checkpoint, dense or quantized, in float32; `against` names the original to compare with.

    Raises QuantizationError like `load_dense`, for a text that does not suit, and for a window that is longer than what
    a model has positions for.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for folder in (model, against) if against else (model,):
        positions = model_positions(load_config(open_checkpoint(folder)))
        if positions is not None and window > positions:
            raise QuantizationError(f"--window {window} exceeds the {positions} positions of {folder}")
    windows = evaluation_windows(against or model, data, window, samples)
    candidate = load_dense(model, device)
    original = load_dense(against, device) if against else None
    batch = max(1, BATCH_TOKENS // window)
    candidate_nll, original_nll, divergence, agreement = [], [], [], []
    with (
        torch.inference_mode(),
        counting_progress() as progress,
        progress.phase("evaluating", len(windows), "windows") as phase,
    ):
        for tokens in windows.split(batch):
            log_p, nll = _predict(candidate, tokens.to(device))
            candidate_nll.append(nll)
            if original is not None:
                log_q, nll = _predict(original, tokens.to(device))
                original_nll.append(nll)
                divergence.append(torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1))
                agreement.append((log_p.argmax(-1) == log_q.argmax(-1)).float())
            phase.advance(len(tokens))
    nll = torch.cat(candidate_nll).double()
    mean, error = _mean_and_error(nll)
    comparison = None
    if original is not None:
        reference = torch.cat(original_nll).double()
        comparison = Comparison(
            _perplexity(float(reference.mean()), against),
            *_mean_and_error(nll - reference),
            *_mean_and_error(torch.cat(divergence).double()),
            float(torch.cat(agreement).mean()),
        )
    by_position = [float(part.mean()) for part in nll.chunk(8, dim=1)]
    return Evaluation(_perplexity(mean, model), mean, error, by_position, nll.numel(), len(windows), window, comparison)


def _perplexity(nll: float, model: str | Path | None) -> float:
    """exp(nll). Raises QuantizationError where it is no number, as with a damaged embedding or norm."""
    try:
        perplexity = math.exp(nll)
    except OverflowError:
        perplexity = math.inf
    if not math.isfinite(perplexity):
        raise QuantizationError(f"{model}: {nll:g} nats per token, so its weights are damaged: copy it again")
    return perplexity


def _predict(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [windows, window − 1, vocabulary], and the negative log-likelihood of each next token."""
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    log_p = torch.log_softmax(logits, -1)
    return log_p, -log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1).cpu()


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean over everything, and its standard error with windows [windows, positions] as the independent samples."""
    means = values.cpu().mean(1)
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else float("nan")
    return float(means.mean()), error
