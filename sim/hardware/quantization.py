"""What a checkpoint says of its quantised weights and KV cache.

``quantization_config`` in config.json, or ModelOpt's ``hf_quant_config.json`` beside it: a format for each
module, with the lists of what stays in 16 bits. Bytes of a weight include its scales and zeros.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from servecast.sim.inputs.errors import InputError

_EXCEPTIONS = (
    "ignore",
    "exclude_modules",
    "ignored_layers",
    "modules_to_not_convert",
    "llm_int8_skip_modules",
)
_PREFIXES = ("model.", "model.language_model.", "language_model.model.", "backbone.", "")
_ALIASES = {  # of modules, as some checkpoints name them
    "mlp.shared_experts.": (
        "mlp.shared_expert.",
        "shared_mlp.",
        "feed_forward.shared_expert.",
        "mixer.shared_experts.",
    ),
    "mlp.experts.": ("block_sparse_moe.experts.", "feed_forward.experts.", "mixer.experts."),
    "mlp.": ("feed_forward.", "mixer."),
    "self_attn.": ("mixer.", "linear_attn.", "attn."),
    "mixer.": ("mamba.",),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are stored: ``dtype`` as in ``gpu_constants.WeightDtype``, ``weight_bytes`` each, scaled by
    blocks of ``block`` inputs that ranks may not cut (0: not by blocks). ``note``: what is not as it is
    timed."""

    dtype: str
    weight_bytes: int | float
    block: int = 0
    note: str = ""


SIXTEEN = Format("bf16", 2)
_SLOW_INT8 = "products of eight-bit integers are timed as if they were multiplied in 16 bits"
_SLOW_BNB = "the kernels of bitsandbytes are timed as Marlin's, which are faster"
_SLOW_FP8 = "fp8 activations of four-bit weights are timed as 16-bit ones"


@dataclass(frozen=True)
class Quantization:
    """Of linear weights.

    Attributes:
        formats: (targets, format): the first of which a target matches a module; "" matches all.
        exceptions: modules that stay in 16 bits.
        kv_bytes: of a number in the KV cache, None if not said.
        capability: compute capability times ten that vLLM asks for; 0: any.
        method: as the config names it.
    """

    formats: tuple[tuple[tuple[str, ...], Format], ...] = ()
    exceptions: tuple[str, ...] = ()
    kv_bytes: int | None = None
    capability: int = 0
    method: str = ""
    _cache: dict[tuple[str, ...], Callable[[str], bool]] = field(default_factory=dict, compare=False)

    def format_of(self, module: str) -> Format:
        """Of a module as ``layers.0.mlp.up_proj``."""
        if not self.formats or self._any(self.exceptions, module):
            return SIXTEEN
        return next(
            (form for targets, form in self.formats if "" in targets or self._any(targets, module)), SIXTEEN
        )

    def keeps(self, module: str) -> bool:
        """Whether a module stays in 16 bits."""
        return self.format_of(module) is SIXTEEN

    def _any(self, patterns: tuple[str, ...], module: str) -> bool:
        if patterns not in self._cache:
            self._cache[patterns] = _matcher(patterns)
        return any(map(self._cache[patterns], _names(module)))


def _names(module: str) -> Iterator[str]:
    """The names that checkpoints may give a module."""
    inner = [module]
    for ours, theirs in _ALIASES.items():
        inner += [name.replace(ours, other) for name in inner if ours in name for other in theirs]
    return (prefix + name for prefix in _PREFIXES for name in inner)


def _matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """compressed-tensors writes whole names or ``re:`` expressions, ModelOpt wildcards, Transformers
    parts."""
    loose = [each[3:] for each in patterns if each.startswith("re:")]
    loose += [
        re.escape(each).replace(r"\*", ".*") + r"\Z"
        for each in patterns
        if "*" in each and not each.startswith("re:")
    ]
    whole = {each for each in patterns if not each.startswith("re:") and "*" not in each}
    expressions = [re.compile(each) for each in loose]

    def matches(name: str) -> bool:
        parts = name.split(".")
        size = len(parts)
        return any(
            ".".join(parts[first:last]) in whole
            for first in range(size)
            for last in range(first + 1, size + 1)
        ) or any(each.match(name) for each in expressions)

    return matches


def read_quantization(config: Mapping[str, Any], where: str) -> Quantization:
    """What a config says.

    Raises:
        InputError: a method or an algorithm that is not modelled.
    """
    said = config.get("quantization_config")
    where = f"{where}: quantization_config"
    if not said:
        return Quantization()
    if not isinstance(said, Mapping):
        raise _refused(said, where)
    if isinstance(said.get("quantization"), Mapping):  # as in hf_quant_config.json
        said = {"quant_method": "modelopt", **said["quantization"]}
    method = str(said.get("quant_method", "modelopt" if "quant_algo" in said else None))
    for name in _EXCEPTIONS:
        if said.get(name) is not None and not isinstance(said[name], list):
            raise _refused(f"with {name} = {said[name]!r}, which is no list,", where)
    exceptions = tuple(str(each) for name in _EXCEPTIONS for each in _list(said.get(name)))
    kv = said.get("kv_cache_scheme")
    kv_bytes = 1 if isinstance(kv, Mapping) and kv.get("num_bits") == 8 else None
    capability = _CAPABILITY.get(method, 0)
    try:
        if method == "compressed-tensors":
            formats = tuple(
                _compressed(group, where) for group in _mapping(said.get("config_groups")).values()
            )
            if not formats:
                raise _refused(method, f"{where}.config_groups")
        elif method.startswith("modelopt"):
            formats = _modelopt(said, where)
            algorithm = str(said.get("kv_cache_quant_algo")).upper()
            if algorithm not in ("NONE", "FP8", "") or (isinstance(kv, Mapping) and kv.get("num_bits") == 4):
                raise _refused(algorithm, f"{where}.kv_cache_quant_algo")
            kv_bytes = 1 if algorithm == "FP8" else kv_bytes
            capability = 75 if any("fp4" in form.dtype for _, form in formats) else capability
        elif method in _METHODS:
            only = ("mlp.experts",) if "mxfp4" in method else ("",)  # vLLM quantises gpt-oss's experts alone
            formats = ((only, _METHODS[method](said)),)
            exceptions += tuple(
                f"re:{each[2:]}" for each in _mapping(said.get("dynamic")) if str(each).startswith("-:")
            )
        else:
            raise _refused(method, f"{where}.quant_method")
        if config.get("expert_dtype") == "fp4":  # DeepSeek V4: experts of four bits among weights of fp8
            formats = ((("mlp.experts",), _MXFP4), *formats)
        found = Quantization(formats, exceptions, kv_bytes, capability, method)
        found.format_of("layers.0.mlp.up_proj")
    except re.error as error:
        raise InputError(
            f"{error.pattern!r} is no regular expression: {error}",
            where=where,
            fix="Take the file from the model's repository.",
        ) from None
    return found


# -- formats ---------------------------------------------------------------------------------------


def _fp8(said: Mapping[str, Any]) -> Format:
    block = said.get("weight_block_size")
    if block and not (isinstance(block, list | tuple) and len(block) == 2 and all(map(_positive, block))):
        raise _refused(f"fp8 by blocks of {block!r}", "quantization_config.weight_block_size")
    return _fp8_blocks(block) if block else Format("fp8", 1)


def _fp8_blocks(block: object) -> Format:
    """A scale of four bytes for each block of rows and columns."""
    sizes = [each for each in block if _positive(each)] if isinstance(block, list | tuple) else []
    rows, columns = (*sizes, 128, 128)[:2] if len(sizes) == 2 else (128, 128)
    return Format("fp8_block", 1 + 4 / (rows * columns), columns)


def _integers(bits: int, group: int, *, zeros: bool = False, note: str = "") -> Format:
    """Whole numbers with a 16-bit scale, and a zero of as many bits, for each group of inputs."""
    shared = (2 + (bits / 8 if zeros else 0)) / group if group > 0 else 0.0
    return Format("int4" if bits <= 4 else "int8", bits / 8 + shared, max(0, group), note)


def _grouped(said: Mapping[str, Any]) -> Format:
    """AWQ, GPTQ, AutoRound: ``bits`` (AWQ's own files: ``w_bit``) and ``group_size``."""
    bits, group = (
        said.get("bits", said.get("w_bit", 4)),
        said.get("group_size", said.get("q_group_size", 128)),
    )
    if bits not in (2, 3, 4, 8) or isinstance(group, bool) or not isinstance(group, int):
        raise _refused(
            f"{said.get('quant_method')} of {bits!r} bits by groups of {group!r}", "quantization_config"
        )
    return _integers(bits, group, zeros=bool(said.get("zero_point", not said.get("sym", True))))


def _bitsandbytes(said: Mapping[str, Any]) -> Format:
    if said.get("load_in_8bit"):
        return Format("int8", 1, note=_SLOW_BNB)
    scales = (1 + 4 / 256) / 64 if said.get("bnb_4bit_use_double_quant") else 4 / 64
    return Format("int4", 0.5 + scales, note=_SLOW_BNB)


_MXFP4 = Format("mxfp4", 0.5 + 1 / 32)  # vLLM pads what ranks would cut (Shard)
_NVFP4 = Format("nvfp4", 0.5 + 1 / 16, 16)
_METHODS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    "fp8": _fp8,
    "deepseek_v4_fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mxfp4": lambda said: _MXFP4,
    "gpt_oss_mxfp4": lambda said: _MXFP4,
    "awq": _grouped,
    "awq_marlin": _grouped,
    "gptq": _grouped,
    "gptq_marlin": _grouped,
    "auto-round": _grouped,
    "auto_round": _grouped,
    "bitsandbytes": _bitsandbytes,
}
_CAPABILITY = {  # of vLLM's classes: get_min_capability
    **dict.fromkeys(("fp8", "awq", "awq_marlin", "deepseek_v4_fp8", "compressed-tensors"), 75),
    **dict.fromkeys(("fbgemm_fp8", "modelopt", "mxfp4", "gpt_oss_mxfp4"), 80),
    **{"gptq": 60, "gptq_marlin": 75, "bitsandbytes": 70},
}
_ALGORITHMS: dict[str, Callable[[int], Format]] = {  # ModelOpt's, by the group size
    "FP8": lambda group: Format("fp8", 1),
    "FP8_PER_CHANNEL_PER_TOKEN": lambda group: Format("fp8", 1),
    "FP8_PB_WO": lambda group: _fp8_blocks([128, 128]),
    "MXFP8": lambda group: Format("fp8_block", 1 + 1 / 32, 32),
    "NVFP4": lambda group: _NVFP4,
    "NVFP4_AWQ": lambda group: _NVFP4,
    "W4A16_NVFP4": lambda group: Format("int4", 0.5 + 1 / 16, 16),
    "W4A16_AWQ": lambda group: _integers(4, group),
    "INT4_AWQ": lambda group: _integers(4, group),
    "W4A8_AWQ": lambda group: _integers(4, group, note=_SLOW_FP8),
    "W8A8_SQ_PER_CHANNEL": lambda group: Format("int8", 1, note=_SLOW_INT8),
}


def _modelopt(said: Mapping[str, Any], where: str) -> tuple[tuple[tuple[str, ...], Format], ...]:
    """One algorithm, or with MIXED_PRECISION one for each of ``quantized_layers``."""

    def read(entry: Mapping[str, Any]) -> Format:
        algorithm, group = str(entry.get("quant_algo")), entry.get("group_size")
        if algorithm not in _ALGORITHMS:
            raise _refused(algorithm, f"{where}.quant_algo")
        return _ALGORITHMS[algorithm](group if _positive(group) else 128)

    layers = _mapping(said.get("quantized_layers"))
    if said.get("quant_algo") != "MIXED_PRECISION" or not layers:
        return ((("",), read(said)),)
    by_format: dict[Format, list[str]] = {}
    for name, entry in layers.items():
        by_format.setdefault(read(_mapping(entry)), []).append(str(name))
    return tuple((tuple(names), form) for form, names in by_format.items())


def _compressed(group: object, where: str) -> tuple[tuple[str, ...], Format]:
    """A group of compressed-tensors: its targets, and how their weights are stored."""
    entry = _mapping(group)
    weights, inputs = _mapping(entry.get("weights")), entry.get("input_activations")
    bits, kind, size = weights.get("num_bits"), weights.get("type", "int"), weights.get("group_size")
    size = size if _positive(size) else 0
    bits = bits if _positive(bits) else 0
    targets = tuple(
        "" if each in ("Linear", "FusedMoE", "RoutedExperts") else str(each)
        for each in (_list(entry.get("targets")) or ["Linear"])
    )
    if kind == "float" and bits == 8:
        block = weights.get("block_structure")
        if size == 32:
            return targets, Format("fp8_block", 1 + 1 / 32, 32)
        if block:
            return targets, _fp8_blocks(block)
        return targets, Format("fp8" if isinstance(inputs, Mapping) else "int8", 1)
    if kind == "float" and bits == 4 and size in (16, 32):
        form = _NVFP4 if size == 16 else _MXFP4
        return targets, form if isinstance(inputs, Mapping) or size == 32 else Format(
            "int4", form.weight_bytes, 16
        )
    if kind == "int" and bits in (4, 8):
        note = "" if not isinstance(inputs, Mapping) else _SLOW_INT8 if bits == 8 else _SLOW_FP8
        return targets, _integers(bits, size, zeros=not weights.get("symmetric", True), note=note)
    raise _refused(f"compressed-tensors of {bits!r} bits, type {kind!r}", f"{where}.config_groups")


def _positive(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 20


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _refused(what: object, where: str) -> InputError:
    text = what if isinstance(what, str) and " " in what else repr(what)
    return InputError(
        f"quantisation {text if len(text) <= 60 else text[:57] + '...'} is not modelled",
        where=where,
        fix="Use unquantised weights, or those of compressed-tensors, ModelOpt, fp8, AWQ, GPTQ, "
        "bitsandbytes or mxfp4.",
    )
