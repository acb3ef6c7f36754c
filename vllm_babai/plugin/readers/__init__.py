"""From the stored tensors of a linear layer to the weight that this rank holds: a reader for each way to hold a format.

A reader is named by the format of the checkpoint and the residency of its weights, see `READERS`.
"""

from vllm_babai.plugin.readers.hptq import HPTQCodedReader, HPTQPackedReader
from vllm_babai.plugin.readers.reader import Reader
from vllm_babai.plugin.readers.ssqr import SSQRReader
from vllm_babai.plugin.readers.trellis import TrellisReader

READERS: dict[tuple[str, str], type[Reader]] = {
    ("ssqr", "packed"): SSQRReader,
    ("hptq", "packed"): HPTQPackedReader,
    ("hptq", "coded"): HPTQCodedReader,
    ("trellis", "tiled"): TrellisReader,
}

__all__ = ["READERS", "HPTQCodedReader", "HPTQPackedReader", "Reader", "SSQRReader", "TrellisReader"]
