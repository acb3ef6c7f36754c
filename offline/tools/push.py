"""Publishing a quantized folder on the Hugging Face hub, in one commit."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from vllm_babai.errors import QuantizationError
from vllm_babai.offline.model.checkpoint import open_checkpoint
from vllm_babai.offline.model.complete import check_complete, read_scheme
from vllm_babai.offline.model.place import RUN


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a quantized folder as organization/name, which is made where it is not there; returns its address.

    All files go up in one commit, so an interrupted upload leaves the repository as it was; started again, what has
    already arrived is not sent twice. Raises QuantizationError where the folder is not a whole checkpoint of babai, the
    name is none, or the hub refuses.
    """
    checkpoint = open_checkpoint(folder)
    if read_scheme(checkpoint) is None:
        raise QuantizationError(f"{folder} is not quantized: make a checkpoint with `babai quantize`")
    if (folder / RUN).exists():
        raise QuantizationError(f"{folder} is of a run that has not ended: finish it with --resume first")
    check_complete(checkpoint)
    try:
        validate_repo_id(repository)
        hub = HfApi()
        address = hub.create_repo(repository, private=private or None, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload of `babai push`")
    except HFValidationError as error:
        raise QuantizationError(f"{repository} is no name of a repository (organization/name): {error}") from error
    except LocalTokenNotFoundError as error:
        raise QuantizationError("nobody is logged in to the hub: run `hf auth login` first") from error
    except (HfHubHTTPError, OSError) as error:
        raise QuantizationError(f"{repository}: the hub does not take it: {error}") from error
    return str(address)
