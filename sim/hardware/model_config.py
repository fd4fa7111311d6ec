"""What a Hugging Face ``config.json`` says of a model's sizes, family by family.

A family is the attention and MLP of one ``model_type``: what its class in Transformers adds to the fields
of the file. Families whose attention is grouped-query, full or over a sliding window, are read; all others
are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from servecast.sim.hardware.model_families import ALIASES, FAMILIES, Experts, Family
from servecast.sim.hardware.quantization import Quantization, read_quantization
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import did_you_mean

_SEES = ("vision_config", "audio_config", "visual")
_NOT_MODELLED = {
    "kv_lora_rank": "multi-head latent attention",
    "is_encoder_decoder": "an encoder and a decoder",
    "linear_num_key_heads": "linear attention",
    "linear_attn_config": "linear attention",
    "mamba_d_state": "state-space layers",
    "ssm_state_size": "state-space layers",
    "ssm_cfg": "state-space layers",
    "hybrid_override_pattern": "state-space layers",
}
_LARGEST = 1 << 40  # of any size; of layers, 4,096
_DTYPES = ("bfloat16", "float16", "float32")
LEFT_OUT = "images and audio are left out: the text model alone is simulated, without its encoders' weights"


@dataclass(frozen=True, slots=True)
class _File:
    """The fields of a config, and where it lies, for messages."""

    config: Mapping[str, Any]
    where: str

    def count(self, *fields: str, default: int | None = None) -> int:
        """A positive whole number, under the first of ``fields`` that is there."""
        field = next((name for name in fields if self.config.get(name) is not None), fields[0])
        value = self.config.get(field, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
            problem = "is missing" if value is None else f"is {_short(value)}, not a positive integer"
            raise InputError(
                f"{field} {problem}",
                where=f"{self.where}: {field}",
                fix="Take the file from the model's repository.",
            )
        return value

    def amount(self, field: str, default: int = 0) -> int:
        """A whole number that may be 0 or missing."""
        value = self.config.get(field)
        return default if value in (None, 0, False) else self.count(field)

    def listed(self, field: str) -> list[Any]:
        """A list, empty where there is none."""
        value = self.config.get(field) or []
        if not isinstance(value, list):
            raise InputError(
                f"{field} is {_short(value)}, not a list",
                where=f"{self.where}: {field}",
                fix="Take the file from the model's repository.",
            )
        return value

    def says(self, answer: bool | str, default: bool = False) -> bool:
        """A fact of the family, or of the file's field of that name."""
        return bool(self.config.get(answer, default)) if isinstance(answer, str) else answer


def shape_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a ``ModelShape``, all but its name.

    Raises:
        InputError: field missing or not a positive integer, architecture or quantisation that is not
        modelled.
    """
    config, notes = _text_part(config, where)
    model_type = str(config.get("model_type"))
    family = _family(config, where)
    config = family.rename(config)
    file = _File(config, where)
    layers, heads, hidden = (
        file.count("num_hidden_layers", "num_layers", "n_layers"),
        file.count("num_attention_heads"),
        file.count("hidden_size"),
    )
    if layers > 4096:
        raise InputError(
            f"{layers} layers are no model's", where=f"{where}: num_hidden_layers", fix="Correct the file."
        )
    kv_heads = file.count("num_key_value_heads", default=heads)
    head_dim = file.count("head_dim", default=hidden // heads)
    dtype_bytes = _dtype_bytes(config, where)
    quantization = read_quantization(config, dtype_bytes, where)
    sliding = _sliding_layers(file, family, layers)
    mixture = (
        _no_mixture(file, model_type) if family.experts is None else _mixture(file, family.experts, layers)
    )
    dense_width = "intermediate_size" if family.experts is None else family.experts.dense_width
    has_dense = mixture.get("moe_layers", 0) < layers
    intermediate = file.count(dense_width) if has_dense or dense_width in config else 1
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": file.count("vocab_size"),
        "tied_embeddings": bool(config.get("tie_word_embeddings", family.tied)),
        "qkv_bias": file.says(family.qkv_bias),
        "out_bias": file.says(family.out_bias),
        "mlp_bias": file.says(family.mlp_bias),
        "mlp_products": 3 if family.gated else 2,
        "qk_norm": family.qk_norm != "no" and file.says(family.qk_norm_field or True),
        "norms_per_layer": config[family.norms] if isinstance(family.norms, str) else family.norms,
        "qk_norm_over_ranks": family.qk_norm == "all" and file.says(family.qk_norm_field or True),
        "dtype_bytes": dtype_bytes,
        "weight_bytes_each": quantization.weight_bytes,
        "weight_block": quantization.block,
        "kv_bytes_each": quantization.kv_bytes or 2,
        **mixture,
        "sliding_window": file.count("sliding_window") if sliding else 0,
        "sliding_layers": sliding,
        "model_type": model_type,
        "notes": notes,
        **_positions(file),
    }
    sizes["other_weights"] = _other_weights(file, family, sizes)
    sizes["kept_weights"] = _kept_weights(quantization, sizes)
    return sizes


def _text_part(config: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The text model's fields, and a note if there is more than text."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        if "model_type" not in text:
            raise InputError(
                f"text_config = {_short(text)} names no model_type",
                where=f"{where}: text_config",
                fix="Take the file from the model's repository.",
            )
        shared = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")
        outer = {name: config[name] for name in shared if config.get(name) is not None}
        return {**outer, **text}, (LEFT_OUT,)
    return config, (LEFT_OUT,) if any(config.get(name) for name in _SEES) else ()


def _family(config: Mapping[str, Any], where: str) -> Family:
    model_type = config.get("model_type")
    for field, what in _NOT_MODELLED.items():
        if config.get(field):
            raise InputError(
                f"{field} = {_short(config[field])} belongs to an architecture that is not modelled: {what}",
                where=f"{where}: {field}",
                fix=f"Use a text model of one of the types {', '.join(FAMILIES)}.",
            )
    found = FAMILIES.get(ALIASES.get(str(model_type), str(model_type)))
    if found is None:
        near = did_you_mean(str(model_type), FAMILIES) if model_type else ""
        raise InputError(
            f"model_type {model_type!r} is not modelled" if model_type else "model_type is missing",
            where=f"{where}: model_type",
            fix=f"{near} Use one of {', '.join(FAMILIES)}.".strip(),
        )
    return found


def _no_mixture(file: _File, model_type: str) -> dict[str, int]:
    """Of a dense family, whose config must not speak of experts."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if file.config.get(name) not in (None, 0, 1):
            raise InputError(
                f"{name} = {_short(file.config[name])}, but models of type {model_type!r} have no experts",
                where=file.where,
                fix="Correct model_type, or remove the field.",
            )
    return {}


def _mixture(file: _File, experts: Experts, layers: int) -> dict[str, int]:
    """The fields of a mixture; none where no layer has experts."""
    config = file.config
    count = next((config[name] for name in experts.count if config.get(name)), 0)
    with_experts = [layer for layer in range(layers) if _has_experts(file, experts, layer, layers)]
    if not count or not with_experts:
        return {}
    width = file.count(experts.width)
    shared = file.amount(experts.shared) if experts.shared else 0
    if experts.shared_count:
        shared = width * file.amount(experts.shared_count)
    return {
        "experts": file.count(*experts.count),
        "experts_per_token": file.count(experts.active),
        "expert_intermediate_size": width,
        "shared_expert_size": shared,
        "moe_layers": len(with_experts),
    }


def _has_experts(file: _File, experts: Experts, layer: int, layers: int) -> bool:
    config = file.config
    if experts.layers == "steps":
        step = file.count("decoder_sparse_step", default=1)
        return layer not in file.listed("mlp_only_layers") and (layer + 1) % step == 0
    if experts.layers == "behind":
        return layer >= file.amount("first_k_dense_replace")
    if experts.layers == "interleaved":
        listed = file.listed("moe_layers")
        step = file.count("interleave_moe_layer_step", default=1)
        return layer in listed if listed else (layer + 1) % step == 0
    if experts.layers == "interval":
        first, last = file.amount("moe_layer_start_index"), layers - 1
        if config.get("moe_layer_end_index") != -1:
            last = file.amount("moe_layer_end_index", layers - 1)
        return first <= layer <= last and (layer + 1) % file.count("moe_layer_interval", default=1) == 0
    return True


def _other_weights(file: _File, family: Family, sizes: Mapping[str, Any]) -> int:
    """Small weights that ``ModelShape`` does not count by itself: biases of norms and of the LM head, norms
    of query and key over all heads, gates of shared experts, biases of routers."""
    hidden, layers = sizes["hidden_size"], sizes["layers"]
    total = 0 if family.final_norm else -hidden
    if family.norm_bias:
        total += (layers * sizes["norms_per_layer"] + 1) * hidden
    if sizes["qk_norm"] and family.qk_norm in ("heads", "all"):
        total += layers * (sizes["heads"] + sizes["kv_heads"] - 2) * sizes["head_dim"]
    total += sizes["vocab_size"] if family.head_bias else 0
    total += layers * sizes["heads"] if family.sinks else 0
    total += file.count("max_position_embeddings") * hidden if file.config.get("learned_positions") else 0
    if sizes["mlp_bias"] and not family.gated:
        total -= layers * sizes["intermediate_size"]
    if family.experts is not None and sizes.get("moe_layers"):
        total += sizes["moe_layers"] * hidden if family.experts.shared_gate else 0
        total += sizes["moe_layers"] * sizes["experts"] if family.experts.router_bias else 0
        biases = sizes["experts"] * (2 * sizes["expert_intermediate_size"] + hidden)
        total += sizes["moe_layers"] * biases if family.experts.bias else 0
    return total


def _kept_weights(quantization: Quantization, sizes: Mapping[str, Any]) -> int:
    """Linear weights that stay in 16 bits by a list of exceptions, experts included."""
    if not quantization.exceptions:
        return 0
    hidden, head = sizes["hidden_size"], sizes["head_dim"]
    query, key = sizes["heads"] * head, sizes["kv_heads"] * head
    attention = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": query}
    names = ("gate_proj", "up_proj", "down_proj")[3 - sizes["mlp_products"] :]
    first_moe = sizes["layers"] - sizes.get("moe_layers", 0)
    kept = 0
    for layer in range(sizes["layers"]):
        at = f"model.layers.{layer}"
        kept += sum(
            hidden * width
            for name, width in attention.items()
            if quantization.keeps(f"{at}.self_attn.{name}")
        )
        if layer < first_moe:
            mlp = {f"{at}.mlp.{name}": sizes["intermediate_size"] for name in names}
        else:
            shared, routed = sizes["shared_expert_size"], sizes["expert_intermediate_size"]
            mlp = {f"{at}.mlp.shared_expert.{name}": shared for name in names}
            mlp |= {f"{at}.mlp.experts.0.{name}": sizes["experts"] * routed for name in names}
        kept += sum(hidden * width for name, width in mlp.items() if quantization.keeps(name))
    return kept


def _positions(file: _File) -> dict[str, int | None]:
    """The longest context: the file's positions, stretched as its RoPE says.

    Under YaRN a file may say the stretched length or the original one: vLLM takes the original times the
    factor, from 0.32 on what max_position_embeddings says. Under LongRoPE the default is the original
    length.
    """
    config = file.config
    longest = config.get("max_position_embeddings")
    if longest is None:
        return {"max_position_embeddings": None, "yarn_positions": None, "default_positions": None}
    positions = file.count("max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping) or not rope:
        return {"max_position_embeddings": positions, "yarn_positions": None, "default_positions": None}
    nested = [each for each in rope.values() if isinstance(each, Mapping)]
    yarn: int | None = None
    factor = 1.0
    default: int | None = None
    for each in nested or [rope]:
        kind = each.get("rope_type", each.get("type", "default"))
        stretch = each.get("factor") or 1.0
        if not isinstance(stretch, int | float) or not 0 < stretch < 1e6:
            raise InputError(
                f"factor is {_short(stretch)}, not a positive number",
                where=f"{file.where}: rope_scaling.factor",
                fix="Take the file from the model's repository.",
            )
        original = each.get("original_max_position_embeddings") or config.get(
            "original_max_position_embeddings"
        )
        original = original if isinstance(original, int) and 0 < original <= _LARGEST else None
        if kind == "yarn":
            yarn = int((original or positions) * stretch)
        elif kind == "longrope":
            default = original
        elif kind in ("linear", "dynamic") and "gemma3" not in str(config.get("model_type")):
            factor = float(stretch)
    return {
        "max_position_embeddings": int(positions * factor),
        "yarn_positions": yarn,
        "default_positions": default,
    }


def _dtype_bytes(config: Mapping[str, Any], where: str) -> int:
    dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    if dtype not in _DTYPES:
        raise InputError(
            f"torch_dtype {dtype!r} is not known",
            where=f"{where}: torch_dtype",
            fix=f"Use {', '.join(_DTYPES)}.",
        )
    return 2  # vLLM's --dtype auto casts float32 weights down to half precision


def _sliding_layers(file: _File, family: Family, layers: int) -> int:
    config = file.config
    if config.get("layer_types") is not None:
        return _sliding_types(file.listed("layer_types"), layers, file.where)
    window = config.get("sliding_window")
    if family.sliding == "all":
        positions = config.get("max_position_embeddings")
        slides = isinstance(window, int) and not (isinstance(positions, int) and window >= positions)
        return layers if slides else 0
    if family.sliding == "qwen":
        if not config.get("use_sliding_window"):
            return 0
        return max(0, layers - file.amount("max_window_layers"))
    if isinstance(family.sliding, int) and window:
        pattern = config.get("sliding_window_pattern") or family.sliding
        every = len(pattern) if isinstance(pattern, str) else 0
        every = every or file.count("sliding_window_pattern", default=family.sliding)
        return layers - layers // every  # every n-th layer is full
    return 0


def _sliding_types(types: Sequence[str], layers: int, where: str) -> int:
    known = ("full_attention", "sliding_attention", "chunked_attention")  # vLLM caches chunked ones as full
    unknown = [kind for kind in types if kind not in known]
    if unknown or len(types) != layers:
        raise InputError(
            f"{len(types)} entries, the unknown among them {unknown[:3]}, for {layers} layers",
            where=f"{where}: layer_types",
            fix="Only full_attention and sliding_attention, one a layer, are modelled.",
        )
    return sum(kind == "sliding_attention" for kind in types)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
