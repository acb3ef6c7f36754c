"""Embeddings, norms, biases and other tensors that were left as they were: vLLM loads them, and we compare them."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from vllm.config import LoadConfig, ModelConfig
from vllm.distributed import get_world_group, model_parallel_is_initialized
from vllm.logger import init_logger

from vllm_babai.format.checksums import check_kept

logger = init_logger(__name__)


class KeptTensors:
    """The checksums of the tensors that are stored as they were, compared once, when a model was loaded first.

    The methods of its layers share this. What is compared is the files, which vLLM has just read: on the first rank of
    every machine, all tensors whole. Quantized linears need it not: every rank checks what it takes of them.
    """

    def __init__(self, checksums: dict[str, str] | None) -> None:
        self.checksums = checksums

    def check(self, model: ModelConfig, load: LoadConfig) -> None:
        """Raise FormatError that names a tensor which is missing, or another than config.json says. Then never again:
        weights that are loaded anew, as in training, may differ.
        """
        checksums, self.checksums = self.checksums, None
        first = not model_parallel_is_initialized() or get_world_group().local_rank == 0
        if not checksums or not first or load.load_format == "dummy":
            return
        files = _weight_files(model, load)
        if files:
            check_kept(files, checksums)
        else:
            logger.warning("%s: its weight files are not here; embeddings and norms are not compared", model.model)


def _weight_files(model: ModelConfig, load: LoadConfig) -> list[Path]:
    folder = Path(model.model)
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(
                    model.model, revision=model.revision, cache_dir=load.download_dir, local_files_only=True
                )
            )
        except (HFValidationError, LocalEntryNotFoundError):
            return []
    return sorted(folder.glob("*.safetensors"))
