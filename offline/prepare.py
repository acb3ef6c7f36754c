"""What a run and its prediction begin with: the model to be streamed, its parts, and the calibration inputs."""

from dataclasses import dataclass
from pathlib import Path

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.calibration import calibration_tokens, load_tokenizer
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.streamed import StreamedModel, open_streamed
from vllm_babai.offline.model.walk import Inputs, Part, parts_of
from vllm_babai.offline.options import QuantizeOptions
from vllm_babai.offline.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Prepared:
    """A model, what of it is to be quantized, and the inputs of its first block: of several ranks, this one's share."""

    model: StreamedModel
    parts: list[Part]
    inputs: Inputs
    ranks: Ranks = ALONE

    @property
    def blocks(self) -> list[Part]:
        """The parts that are decoder blocks: all but head and embedding."""
        return self.parts[: len(self.inputs.calls)]

    @property
    def walked(self) -> list[Part]:
        """The parts that hidden states go through: all but an embedding that makes no logits."""
        return [part for part in self.parts if not part.is_lookup]

    @property
    def embedding(self) -> Part | None:
        """The embedding, where it is to be quantized and makes no logits."""
        return next((part for part in self.parts if part.is_lookup), None)


def prepare(model: str | Path, options: QuantizeOptions, ranks: Ranks = ALONE) -> Prepared:
    """Open a folder or hub model, and run its embedding over the calibration text, this rank's share of it.

    Raises QuantizationError for anything the user can fix: a model or a text that does not suit, an option that does
    not suit the model.
    """
    checkpoint = open_checkpoint(model)
    device = options.resolve_device()
    streamed = open_streamed(checkpoint, device, options.resolve_dtype(device))
    parts = parts_of(streamed, options)
    tokenizer = load_tokenizer(checkpoint.folder)
    length = _sequence_length(options, streamed.positions)
    if options.samples < ranks.count:
        raise QuantizationError(
            f"--samples {options.samples} are too few for {ranks.count} ranks: one each is the least"
        )
    tokens = calibration_tokens(tokenizer, options.calibration, options.samples, length, options.seed)
    tokens = tokens[ranks.share(len(tokens))]
    return Prepared(streamed, parts, Inputs(tokens, *streamed.first_inputs(tokens)), ranks)


def _sequence_length(options: QuantizeOptions, positions: int) -> int:
    """Tokens per calibration sequence. Raises QuantizationError when the model has fewer positions."""
    if options.sequence_length > positions:
        raise QuantizationError(
            f"--sequence-length {options.sequence_length} exceeds the model's {positions} positions"
        )
    return options.sequence_length or min(2048, positions)
