"""What vLLM reads by itself, and we look at: weight files, and tensors that were left as they were, such as norms."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from vllm.config import LoadConfig, ModelConfig
from vllm.distributed import get_world_group, model_parallel_is_initialized
from vllm.logger import init_logger

from vllm_babai.format.checksums import check_kept
from vllm_babai.plugin.weight_files import check_weight_files

logger = init_logger(__name__)


class KeptTensors:
    """The checksums of the tensors that are stored as they were, compared once, when a model was loaded first.

    The methods of its layers share this; before the first load they have the weight files looked at, too. What is
    compared is the files, which vLLM has just read: on the first rank of every machine, all tensors whole. Quantized
    linears need it not: every rank checks what it takes of them.
    """

    def __init__(self, checksums: dict[str, str] | None) -> None:
        self.checksums = checksums
        self.files_checked = False

    def check_files(self, model: ModelConfig | None, load: LoadConfig) -> None:
        """Raise FormatError that names a weight file or tensor at fault, before vLLM reads any; the first time.

        What is fetched from the hub is not looked at: it comes whole, or not at all. model: None for a lone layer.
        """
        if not self.files_checked and model is not None and load.load_format != "dummy" and Path(model.model).is_dir():
            check_weight_files(Path(model.model), self.checksums)
        self.files_checked = True

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
