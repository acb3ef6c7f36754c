"""`quantization_config` in a checkpoint's config.json: how every linear layer is stored."""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from vllm_babai.errors import FormatError
from vllm_babai.format.registry import FORMATS

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # 1: SSQR with one CRC for a whole linear, no names of linears, no digests
QUANT_METHOD = "babai"
GROUP_SIZES = (-1, 32, 64, 128)
# What config.json of a quantized checkpoint has as `attn_implementation`. transformers loads a checkpoint of an unknown
# quantization with a warning and random weights; of all fields that vLLM leaves alone, this one makes it fail instead
# (4.57 and 5.19), and shows the value.
REFUSAL = "none: run `import vllm_babai.transformers` first, as this checkpoint is quantized by babai"
OWN_ATTENTION = "babai_attn_implementation"  # beside it: what the model's authors had there
RESIDENCIES = ("packed", "coded", "tiled")
OF_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(\w+)")


def layer_name(linear: str) -> str:
    """Name by which `ignore` and `overrides` know a linear: those of experts go without the expert's number, as all
    experts of a layer are stored alike: `….mlp.experts.17.up_proj` is `….mlp.experts.up_proj`.
    """
    found = OF_EXPERT.fullmatch(linear)
    return f"{found.group(1)}.{found.group(2)}" if found else linear


@dataclass(frozen=True)
class LayerScheme:
    """How one linear is stored: dense bits (SSQR's alone), and input features per scale (−1: all that a row has)."""

    bits: int | None
    group_size: int = -1

    def groups(self, in_features: int) -> int:
        """Scales per output row."""
        return 1 if self.group_size == -1 else in_features // self.group_size


@dataclass(frozen=True)
class CheckpointConfig:
    """The quantization_config of a babai checkpoint.

    format: name in `format.FORMATS`. bits, group_size: scheme of every linear that `overrides` does not name.
    ignore: full names of linears stored as they were. overrides: full name of a linear → fields of its LayerScheme. In
    both, all experts of a layer have one name, see `layer_name`.
    residency: while it is served: `packed`, dense + sparse; `coded`, HPTQ decoded by every matmul; `tiled`, a trellis.
    scope: full names of the modules, decoder blocks, in which linears are quantized; those outside of them are not,
    unless `overrides` names them. None, as in older checkpoints: the whole model.
    linears: which linears of those blocks are quantized where `ignore` does not name them, by their names in a block
    (`mlp.up_proj`) with # for numbers. None, as in older checkpoints: all.
    digest: of the weight files, see `checksums.digest_of`; None in version 1. vLLM keys its compiled graphs on the
        configuration, and so tells checkpoints of other content apart.
    checksums: full name of a tensor that is stored as it was → its `checksums.tensor_checksum`; None in version 1.
    embedding: full name of the embedding where it is quantized, which makes the logits, too, if the model ties them;
    `overrides` has it as well. None, and then not written: it is stored as it was.
    """

    format: str
    bits: int | None = None
    group_size: int = -1
    ignore: list[str] = field(default_factory=list)
    overrides: dict[str, dict[str, int]] = field(default_factory=dict)
    residency: str = "packed"
    scope: list[str] | None = None
    linears: list[str] | None = None
    digest: str | None = None
    checksums: dict[str, str] | None = field(default=None, repr=False)
    embedding: str | None = None

    def is_quantized(self, name: str) -> bool:
        """Whether the linear called `name` is quantized."""
        if name in self.ignore or layer_name(name) in self.ignore:
            return False
        if self.scope is None or name in self.overrides:
            return True
        block = next((block for block in self.scope if name.startswith(f"{block}.")), None)
        return block is not None and (self.linears is None or kind_of(name, block) in self.linears)

    def scheme(self, name: str) -> LayerScheme:
        """How the linear called `name` is stored."""
        override = self.overrides.get(layer_name(name), {})
        fields: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, **override}
        return LayerScheme(**fields)

    def check_residency(self) -> None:
        """Raise FormatError for an unknown residency, or one that this format does not have."""
        if self.residency not in RESIDENCIES:
            raise FormatError(f"residency is {self.residency!r}; this version knows {RESIDENCIES}")
        if self.residency not in FORMATS[self.format].residencies:
            able = " or ".join(repr(form.name) for form in FORMATS.values() if self.residency in form.residencies)
            raise FormatError(
                f"residency {self.residency!r} is for checkpoints of format {able}; this one is {self.format!r}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        fields = asdict(self)
        if self.embedding is None:
            del fields["embedding"]
        return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **fields}

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "CheckpointConfig":
        """Read and check a quantization_config. Raises FormatError that names the field at fault."""
        if not isinstance(raw, dict):
            raise FormatError(f"quantization_config is {raw!r}; it must be an object")
        fields = dict(raw)
        if fields.pop("quant_method", None) != QUANT_METHOD:
            raise FormatError(f"quant_method is {raw.get('quant_method')!r}, not {QUANT_METHOD!r}")
        version = fields.pop("format_version", None)
        if version not in READABLE_VERSIONS or not _is_integer(version):
            raise FormatError(f"format_version is {version}; this version of vllm-babai reads {READABLE_VERSIONS}")
        unknown = fields.keys() - cls.__dataclass_fields__.keys()
        missing = {"format"} - fields.keys()
        if unknown or missing:
            raise FormatError(f"quantization_config has unknown fields {sorted(unknown)}, lacks {sorted(missing)}")
        for name, value in fields.items():
            if not CHECKS[name].holds(value):
                raise FormatError(f"{name} is {value!r}; it must be {CHECKS[name].what}")
        config = cls(**fields)
        if config.format not in FORMATS:
            raise FormatError(f"format is {config.format!r}; this version reads {tuple(FORMATS)}")
        config.check_residency()
        if config.embedding is not None and config.embedding not in config.overrides:
            raise FormatError(f"embedding is {config.embedding!r}, which overrides does not have")
        known = LayerScheme.__dataclass_fields__.keys()
        for name, override in config.overrides.items():
            if unknown := override.keys() - known:
                raise FormatError(
                    f"overrides of {name} has unknown fields {sorted(unknown)}; known are {sorted(known)}"
                )
            for key, value in override.items():
                if not CHECKS[key].holds(value):
                    raise FormatError(f"{key} of {name} is {value!r}; it must be {CHECKS[key].what}")
        for name in ("", *config.overrides):
            scheme, owner = config.scheme(name), name or "the checkpoint"
            widths = FORMATS[config.format].bit_widths
            if widths is not None and scheme.bits not in widths:
                raise FormatError(f"bits of {owner} is {scheme.bits}; this version reads {widths}")
            if scheme.group_size not in GROUP_SIZES:
                raise FormatError(f"group_size of {owner} is {scheme.group_size}; this version reads {GROUP_SIZES}")
        return config


def is_babai(config: Any) -> bool:
    """Whether what config.json holds is of a checkpoint that babai has quantized."""
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD


def kind_of(linear: str, block: str) -> str:
    """Name of a linear in its block, the same in every block: `mlp.experts.#.up_proj`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", linear.removeprefix(f"{block}."))


def refusing(config: dict[str, Any]) -> dict[str, Any]:
    """config.json with REFUSAL, and what was in its place."""
    own = config.get("attn_implementation")
    kept = {} if own in (None, REFUSAL) else {OWN_ATTENTION: own}
    return config | kept | {"attn_implementation": REFUSAL}


def restored(config: dict[str, Any]) -> dict[str, Any]:
    """config.json without what `refusing` did to it."""
    rest = {key: value for key, value in config.items() if key not in ("attn_implementation", OWN_ATTENTION)}
    own = config.get(OWN_ATTENTION)
    return rest if own is None else rest | {"attn_implementation": own}


def without_refusal(hf_config: Any) -> Any:
    """transformers' configuration of a checkpoint without REFUSAL in it and in those inside it."""
    if getattr(hf_config, "_attn_implementation", None) == REFUSAL:
        hf_config._attn_implementation = None
    return hf_config


class Check(NamedTuple):
    """What the value of a field must be, in words and as a test."""

    what: str
    holds: Callable[[Any], bool]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_overrides(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(override, dict) for key, override in value.items()
    )


def _is_checksums(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(checksum, str) and re.fullmatch("[0-9a-f]{8}", checksum) is not None
        for key, checksum in value.items()
    )


CHECKS = {
    "format": Check("a string", lambda value: isinstance(value, str)),
    "bits": Check("an integer or null", lambda value: value is None or _is_integer(value)),
    "group_size": Check("an integer", _is_integer),
    "ignore": Check("a list of strings", _is_names),
    "overrides": Check("an object of objects", _is_overrides),
    "scope": Check("a list of strings or null", lambda value: value is None or _is_names(value)),
    "linears": Check("a list of strings or null", lambda value: value is None or _is_names(value)),
    "residency": Check("a string", lambda value: isinstance(value, str)),
    "embedding": Check("a string or null", lambda value: value is None or isinstance(value, str)),
    "digest": Check(
        "64 hexadecimal digits or null",
        lambda value: value is None or (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None),
    ),
    "checksums": Check(
        "an object of strings of 8 hexadecimal digits, or null", lambda value: value is None or _is_checksums(value)
    ),
}
