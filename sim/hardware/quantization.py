"""What a checkpoint says of its quantised weights and KV cache.

``quantization_config`` in config.json, or ModelOpt's ``hf_quant_config.json`` beside it. Weights of linear
layers in eight-bit floats are read; what stays in 16 bits by a list of exceptions is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from servecast.sim.inputs.errors import InputError

_FP8_METHODS = ("fp8", "fbgemm_fp8")
_MODELOPT_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO")
_EXCEPTIONS = ("ignore", "exclude_modules", "ignored_layers", "modules_to_not_convert")


@dataclass(frozen=True, slots=True)
class Quantization:
    """Of linear weights: ``weight_bytes`` each, scaled by blocks of ``block`` columns (0: not by blocks), but
    for the modules that ``exceptions`` match. ``kv_bytes`` of a number in the KV cache, None if not said."""

    weight_bytes: int
    block: int = 0
    exceptions: tuple[str, ...] = ()
    kv_bytes: int | None = None

    def keeps(self, module: str) -> bool:
        """Whether a module, as ``model.layers.0.mlp.up_proj``, stays in 16 bits."""
        inside = [module, f"model.language_{module}", f"language_model.{module}"]  # of a multimodal model
        return any(_matches(pattern, name) for pattern in self.exceptions for name in inside)


def _matches(pattern: str, module: str) -> bool:
    """compressed-tensors writes whole names or ``re:`` expressions, ModelOpt wildcards, Transformers
    parts."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    if "*" in pattern:
        return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), module) is not None
    return pattern == module or f".{module}.".find(f".{pattern}.") >= 0


def read_quantization(config: Mapping[str, Any], dtype_bytes: int, where: str) -> Quantization:
    """What a config says; weights of ``dtype_bytes`` where it says nothing.

    Raises:
        InputError: weights of another kind than eight-bit floats.
    """
    said = config.get("quantization_config")
    if not said:
        return Quantization(dtype_bytes)
    if not isinstance(said, Mapping):
        raise _refused(said, f"{where}: quantization_config")
    if isinstance(said.get("quantization"), Mapping):  # as in hf_quant_config.json
        said = {"quant_method": "modelopt", **said["quantization"]}
    method = str(said.get("quant_method", "modelopt" if "quant_algo" in said else None))
    exceptions = tuple(str(each) for name in _EXCEPTIONS for each in _list(said.get(name)))
    block = said.get("weight_block_size")
    kv = said.get("kv_cache_scheme")
    kv_bytes = 1 if isinstance(kv, Mapping) and kv.get("num_bits") == 8 else None
    if method == "compressed-tensors":
        groups = [
            group for group in _mapping(said.get("config_groups")).values() if isinstance(group, Mapping)
        ]
        weights = [_mapping(group.get("weights")) for group in groups]
        if not weights or any(
            entry.get("num_bits") != 8 or entry.get("type") != "float" for entry in weights
        ):
            raise _refused(method, f"{where}: quantization_config.config_groups")
        block = next((entry["block_structure"] for entry in weights if entry.get("block_structure")), block)
    elif method.startswith("modelopt"):
        algorithm = str(said.get("quant_algo"))
        if algorithm not in _MODELOPT_FP8:
            raise _refused(algorithm, f"{where}: quantization_config.quant_algo")
        if str(said.get("kv_cache_quant_algo")).upper() == "FP8":
            kv_bytes = 1
    elif method not in _FP8_METHODS:
        raise _refused(method, f"{where}: quantization_config.quant_method")
    columns = block[0] if isinstance(block, list) and block and isinstance(block[0], int) else 0
    for pattern in exceptions:
        try:
            _matches(pattern, "")
        except re.error as error:
            raise InputError(
                f"{pattern!r} is no regular expression: {error}",
                where=f"{where}: quantization_config",
                fix="Take the file from the model's repository.",
            ) from None
    return Quantization(1, columns, exceptions, kv_bytes)


def _list(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else ()


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _refused(what: object, where: str) -> InputError:
    text = repr(what)
    return InputError(
        f"quantisation {text if len(text) <= 40 else text[:37] + '...'} is not modelled",
        where=where,
        fix="Use weights of eight-bit floats (fp8, compressed-tensors, ModelOpt) or unquantised ones.",
    )
