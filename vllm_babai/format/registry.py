"""The checkpoint formats that this version reads and writes. To add one, see the README beside this file."""

from typing import Any

from vllm_babai.format.base import Format
from vllm_babai.format.dense_sparse.ssqr import SSQR
from vllm_babai.format.entropy.hptq import HPTQ
from vllm_babai.format.trellis.blob import Trellis

FORMATS: dict[str, type[Format[Any]]] = {form.name: form for form in (SSQR, HPTQ, Trellis)}
