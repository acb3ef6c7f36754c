"""The embedding of a model's tokens: whether it can be quantized, and whether it makes the logits, too."""

from torch import nn
from transformers import PreTrainedModel

from vllm_babai.errors import QuantizationError


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the matrix that makes logits is the embedding."""
    head = model.get_output_embeddings()
    return head is not None and getattr(head, "weight", None) is model.get_input_embeddings().weight


def embedding_module(model: PreTrainedModel) -> str:
    """Full name of the module that looks tokens up.

    Subclasses of `nn.Embedding` are known to multiply what they look up by a constant, as Gemma's. Raises
    QuantizationError that says why an embedding cannot be quantized: it is of another kind, the model has more than one
    (as Gemma-3n, with one for each layer), or its head is tied to it and no `nn.Linear`.
    """
    kind, embedding = type(model).__name__, model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise QuantizationError(f"--embedding: {kind} has {type(embedding).__name__}, no nn.Embedding; leave it out")
    modules = dict(model.get_decoder().named_modules())
    others = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Embedding) and module is not embedding and _is_of_tokens(module, embedding)
    ]
    if others:
        raise QuantizationError(
            f"--embedding: {kind} looks tokens up in {', '.join(others)}, too, which babai does not know; leave it out"
        )
    if is_tied(model) and not isinstance(model.get_output_embeddings(), nn.Linear):
        raise QuantizationError(f"--embedding: {kind} ties it to a head that is no nn.Linear; leave it out")
    return next(name for name, module in model.named_modules() if module is embedding)


def _is_of_tokens(module: nn.Embedding, embedding: nn.Embedding) -> bool:
    """Whether it has a row for about every token: others hold positions or kinds. Gemma-3n's lacks some that mean
    images and sounds.
    """
    return 2 * module.num_embeddings > embedding.num_embeddings
