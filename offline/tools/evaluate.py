"""Perplexity of a checkpoint, and how far its next-token distributions are from the original's."""

import math
from collections.abc import Callable, Iterable, Iterator
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

# Log-probabilities [windows, window − 1, vocabulary], and the negative log-likelihood of each next token, [windows,
# window − 1] on the CPU.
Prediction = tuple[Tensor, Tensor]

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
    agreement_error: float


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
    with counting_progress() as progress, progress.phase("evaluating", len(windows), "windows") as phase:
        own = predictions(candidate, windows, phase.advance)
        return compare(own, None if original is None else predictions(original, windows), model, against)


@torch.inference_mode()
def predictions(model: nn.Module, windows: Tensor, tick: Callable[[int], object] | None = None) -> Iterator[Prediction]:
    """What a model predicts of each window, about BATCH_TOKENS tokens at a time. tick: told how many are done."""
    device = next(model.parameters()).device
    for tokens in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
        here = tokens.to(device)
        log_p = torch.log_softmax(model(here, use_cache=False).logits[:, :-1].float(), -1)
        yield log_p, -log_p.gather(-1, here[:, 1:, None]).squeeze(-1).cpu()
        if tick is not None:
            tick(len(tokens))


@torch.inference_mode()
def compare(
    own: Iterable[Prediction], original: Iterable[Prediction] | None, model: str | Path, against: str | Path | None
) -> Evaluation:
    """Evaluation of a model by its predictions, and by the original's of the same windows where there are any.

    model, against: what the two are called in a QuantizationError, for one whose predictions are no numbers.
    """
    losses, original_losses, divergences, agreements = [], [], [], []
    pairs = ((mine, None) for mine in own) if original is None else zip(own, original, strict=True)
    for (log_p, nll), reference in pairs:
        losses.append(nll)
        if reference is not None:
            log_q, original_nll = reference
            original_losses.append(original_nll)
            divergences.append(torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1))
            agreements.append((log_p.argmax(-1) == log_q.argmax(-1)).float())
    nll = torch.cat(losses).double()
    mean, error = _mean_and_error(nll)
    comparison = None
    if original_losses:
        reference_nll = torch.cat(original_losses).double()
        comparison = Comparison(
            _perplexity(float(reference_nll.mean()), against),
            *_mean_and_error(nll - reference_nll),
            *_mean_and_error(torch.cat(divergences).double()),
            *_mean_and_error(torch.cat(agreements).double()),
        )
    by_position = [float(part.mean()) for part in nll.chunk(8, dim=1)]
    shape = (nll.numel(), len(nll), nll.shape[1] + 1)
    return Evaluation(_perplexity(mean, model), mean, error, by_position, *shape, comparison)


def _perplexity(nll: float, model: str | Path | None) -> float:
    """exp(nll). Raises QuantizationError where it is no number, as with a damaged embedding or norm."""
    try:
        perplexity = math.exp(nll)
    except OverflowError:
        perplexity = math.inf
    if not math.isfinite(perplexity):
        raise QuantizationError(f"{model}: {nll:g} nats per token, so its weights are damaged: copy it again")
    return perplexity


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean over everything, and its standard error with windows [windows, positions] as the independent samples."""
    means = values.cpu().mean(1)
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else float("nan")
    return float(means.mean()), error
