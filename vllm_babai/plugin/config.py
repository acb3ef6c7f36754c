"""The quantization method `babai` as vLLM sees it: which layers of a model are quantized, and how."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import ColumnParallelLinear, LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models import ModelRegistry

from vllm_babai.format import FORMATS, CheckpointConfig, LayerScheme
from vllm_babai.format.config import QUANT_METHOD, without_refusal
from vllm_babai.plugin.embedding import BabaiEmbeddingMethod, HeadMethod, check_drafting, register_embedding
from vllm_babai.plugin.expert_residency import EXPERT_RESIDENCIES
from vllm_babai.plugin.experts import BabaiExpertsMethod
from vllm_babai.plugin.kept import KeptTensors
from vllm_babai.plugin.linear import BabaiLinearMethod
from vllm_babai.plugin.lora import check_experts
from vllm_babai.plugin.names import Found, LinearNames, renamed
from vllm_babai.plugin.progress import LoadProgress
from vllm_babai.plugin.readers import READERS

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

FUSED = {  # what vLLM fuses in classes that do not say so, such as that of StableLM
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


def register_config() -> None:
    """Make `babai` known to vLLM as a quantization method. Idempotent."""
    register_quantization_config(QUANT_METHOD)(BabaiConfig)
    register_embedding(BabaiConfig)
    ModelRegistry.register_model("GptOssForCausalLM", "vllm_babai.plugin.gpt_oss:GptOssWithExperts")


class BabaiConfig(QuantizationConfig):
    """The `quantization_config` of a babai checkpoint, matched with the names of vLLM's layers.

    vLLM fuses linears (q_proj, k_proj and v_proj become qkv_proj); the checkpoint names them one by one.
    Raises ValueError without a configuration, that is, for a model that is not quantized.
    """

    def __init__(self, checkpoint: CheckpointConfig | None = None) -> None:
        super().__init__()
        if checkpoint is None:
            raise ValueError(
                "--quantization babai serves checkpoints that babai made, and this model is not quantized; "
                "make one with: babai quantize MODEL OUT --format ssqr --bits 4"
            )
        self.checkpoint = checkpoint
        self.names = LinearNames(checkpoint)
        self.progress = LoadProgress()
        self.kept = KeptTensors(checkpoint.checksums)

    def __repr__(self) -> str:
        return f"BabaiConfig({self.checkpoint})"

    def get_name(self) -> str:
        """`babai`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Activations that the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Smallest compute capability, times ten, that the Triton kernels are compiled for."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the configuration stands in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BabaiConfig":
        """From the quantization_config in config.json. Raises FormatError that names the field at fault."""
        return cls(CheckpointConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Take the residency from `--hf-overrides '{"babai_residency": "coded"}'`.

        An override of `quantization_config` would have to repeat all of it: vLLM replaces dictionaries, it does not
        merge them. Raises FormatError for an unknown residency.
        """
        without_refusal(hf_config)  # some of vLLM's classes build a part of transformers' model
        residency = getattr(hf_config, "babai_residency", self.checkpoint.residency)
        self.checkpoint = replace(self.checkpoint, residency=residency)
        self.checkpoint.check_residency()

    def apply_vllm_mapper(self, hf_to_vllm_mapper: "WeightsMapper") -> None:
        """Rename the layers of the checkpoint to what they are called in vLLM's model."""
        self.names = LinearNames(self.checkpoint, hf_to_vllm_mapper.apply_dict)
        self.checkpoint = renamed(self.checkpoint, hf_to_vllm_mapper.apply_dict)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """How vLLM treats the layer called `prefix`; None (attention, say) leaves it to vLLM.

        Linears are quantized unless the checkpoint ignores them, lm_head only where its overrides name it or it is tied
        to a quantized embedding. Raises NotImplementedError for experts that are coded or with LoRA adapters and for an
        embedding where vLLM drafts tokens, ValueError when linears that vLLM fuses are stored differently.
        """
        if isinstance(layer, RoutedExperts):
            return self._experts(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._vocabulary(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        linears = [self.names.find(name) for name in self._checkpoint_names(prefix)]
        scheme = self._common_scheme(prefix, linears)
        if scheme is None:
            return UnquantizedLinearMethod()
        check_groups(layer, prefix)
        return self._method(self.checkpoint.residency, scheme, prefix, [linear.stored for linear in linears])

    def _vocabulary(self, layer: VocabParallelEmbedding, prefix: str) -> QuantizeMethodBase | None:
        """How head or embedding is held; None where it is not quantized.

        It is never coded: decoded it would be the largest tensor of all. vLLM's classes seldom give an embedding its
        name: one without any is taken for the checkpoint's.
        """
        checkpoint = self.checkpoint
        is_head, embedding = isinstance(layer, ParallelLMHead), checkpoint.embedding
        reader = READERS[checkpoint.format, FORMATS[checkpoint.format].residencies[0]]
        if is_head and prefix in checkpoint.overrides:
            return BabaiLinearMethod(reader(checkpoint.scheme(prefix)), prefix, [prefix], self.progress, self.kept)
        if embedding is None:
            return None
        if is_head:
            return HeadMethod()
        if prefix not in ("", embedding):
            raise NotImplementedError(
                f"{prefix}: vLLM's class looks tokens up there, too, and {embedding} is quantized, which babai does not"
                " serve together; `babai convert OUT NEW --to dense` makes it servable"
            )
        check_drafting(embedding)
        names = [self.names.checkpoint.embedding or embedding]
        return BabaiEmbeddingMethod(reader(checkpoint.scheme(embedding)), embedding, names, self.progress, self.kept)

    def _experts(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        """How the routed experts of a layer are held; None where they are not quantized."""
        asked = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        wanted = {shard: name for shard, name in asked.items() if name is not None}
        stored = self.names.experts(prefix, wanted.values())
        if not stored:
            return None
        check_experts(prefix)
        residency = self.checkpoint.residency
        if residency not in EXPERT_RESIDENCIES:
            raise NotImplementedError(
                f"{prefix}: experts are served with residency 'packed', not {residency!r}"
                ' (--hf-overrides \'{"babai_residency": "packed"}\')'
            )
        names = dict(zip(wanted, stored, strict=True))
        schemes = {shard: self.names.checkpoint.scheme(name.replace("#", "0")) for shard, name in names.items()}
        if len({scheme for shard, scheme in schemes.items() if shard != "w2"}) > 1:
            raise ValueError(f"{prefix}: vLLM fuses gate and up of experts, which the checkpoint stores differently")
        reader = READERS[self.checkpoint.format, residency]
        readers = {"w13": reader(next(iter(schemes.values()))), "w2": reader(schemes["w2"])}
        return BabaiExpertsMethod(layer.moe_config, prefix, names, readers, self.progress, self.kept)

    def _method(self, residency: str, scheme: LayerScheme, prefix: str, names: list[str]) -> QuantizeMethodBase:
        reader = READERS[self.checkpoint.format, residency](scheme)
        return BabaiLinearMethod(reader, prefix, names, self.progress, self.kept)

    def _checkpoint_names(self, prefix: str) -> list[str]:
        """Names, as vLLM has them, of the linears that the checkpoint has for the layer `prefix`, in the order of their
        rows.
        """
        parent, dot, name = prefix.rpartition(".")
        if prefix in self.names:
            return [prefix]
        stored_alone = prefix in self.checkpoint.overrides or prefix in self.checkpoint.ignore
        unfused = [name] if stored_alone else FUSED.get(name, [name])
        return [parent + dot + shard for shard in self.packed_modules_mapping.get(name, unfused)]

    def _common_scheme(self, prefix: str, linears: list[Found]) -> LayerScheme | None:
        """Scheme of linears that are fused; None when they are not quantized."""
        names, checkpoint = [linear.renamed for linear in linears], self.checkpoint
        schemes = [checkpoint.scheme(name) if checkpoint.is_quantized(name) else None for name in names]
        if len(set(schemes)) > 1:
            listing = ", ".join(
                f"{linear.stored}: {scheme or 'not quantized'}" for linear, scheme in zip(linears, schemes, strict=True)
            )
            raise ValueError(f"{prefix}: vLLM fuses linears here that the checkpoint stores differently ({listing})")
        return schemes[0]


def check_groups(layer: LinearBase, prefix: str) -> None:
    """Raise NotImplementedError for a state-space layer of one group on several ranks (Granite 4).

    vLLM repeats the rows of the group on every rank, by a loader for tensors called `weight` alone. Then and only then
    it builds the linear as one of a single part.
    """
    if prefix.endswith(".in_proj") and type(layer) is ColumnParallelLinear and layer.tp_size > 1:
        raise NotImplementedError(
            f"{prefix}: its heads are one group, which vLLM repeats on every rank for dense weights alone: serve with"
            " --tensor-parallel-size 1 (--pipeline-parallel-size may be more), or `babai convert OUT NEW --to dense`"
        )
