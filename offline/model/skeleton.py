"""The model that a checkpoint is of, without weights: what config.json says, built on the meta device."""

from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, PreTrainedModel

from vllm_babai.errors import QuantizationError
from vllm_babai.format.config import without_refusal
from vllm_babai.offline.model.checkpoint import TRUST_REMOTE_CODE, Checkpoint


def load_config(checkpoint: Checkpoint) -> Any:
    """config.json as transformers reads it, without its quantization_config. Raises QuantizationError."""
    path = checkpoint.folder / "config.json"
    if "auto_map" in checkpoint.config() and checkpoint.config().get("model_type") not in _known_types():
        raise QuantizationError(f"{path} asks for code of the model's own, which babai never runs: it is not supported")
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=TRUST_REMOTE_CODE)
    except Exception as error:  # transformers raises many kinds for a value that it does not expect
        raise QuantizationError(f"{path} describes no model that transformers knows: {_line(error)}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return without_refusal(config)


def model_positions(config: Any) -> int | None:
    """How many tokens the model takes at a time; None where its config does not say."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def architecture(config: Any, checkpoint: Checkpoint) -> type[PreTrainedModel]:
    """The class of a model that predicts the next token. Raises QuantizationError for any other kind of model."""
    found: Any = getattr(transformers, str(next(iter(config.architectures or []), "")), None)
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    if not is_model or getattr(found, "config_class", None) is not type(config):
        found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if found is None:
        raise _no_language_model(checkpoint, f"transformers has no causal language model for {config.model_type!r}")
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    if config.is_encoder_decoder or (type(config) in MODEL_FOR_MASKED_LM_MAPPING and not causal):
        raise _no_language_model(checkpoint, f"{found.__name__} is an encoder, which sees the tokens that follow, too")
    return found


def empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model on the meta device, float32. Raises QuantizationError where config.json describes no language model."""
    config = load_config(checkpoint)
    path, blocks = (
        checkpoint.folder / "config.json",
        getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0),
    )
    if isinstance(blocks, int) and blocks > len(checkpoint.files):
        raise QuantizationError(
            f"{path} has {blocks} decoder blocks, but there are {len(checkpoint.files)} tensors in all"
        )
    kind: Any = architecture(config, checkpoint)
    try:
        with torch.device("meta"):
            model = kind._from_config(config, dtype=torch.float32)
    except Exception as error:  # sizes that do not go together fail wherever they meet
        raise QuantizationError(f"{path} describes no model that can be built: {_line(error)}") from error
    if model.get_output_embeddings() is None:
        raise _no_language_model(checkpoint, f"{kind.__name__} makes no logits of the next token")
    return model


def _known_types() -> set[str]:
    from transformers import CONFIG_MAPPING

    return set(CONFIG_MAPPING.keys())


def _no_language_model(checkpoint: Checkpoint, reason: str) -> QuantizationError:
    return QuantizationError(f"{checkpoint.folder} is not a causal language model: {reason}")


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
