"""What a Hugging Face ``config.json`` says of a model's sizes, family by family.

A family is the attention and MLP of one ``model_type``: what its class in Transformers adds to the fields
of the file. Families whose attention is grouped-query, full or over a sliding window, are read; all others
are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from servecast.sim.hardware.config_file import LARGEST, ConfigFile, short
from servecast.sim.hardware.layer_kinds import Mixer
from servecast.sim.hardware.layer_plan import compressed, layer_names, mixers, number_of_layers
from servecast.sim.hardware.model_families import ALIASES, FAMILIES, NOT_MODELLED, Experts, Family
from servecast.sim.hardware.quantization import SIXTEEN, Format, Quantization, read_quantization
from servecast.sim.hardware.vision_tower import vision_tower
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import did_you_mean

_SEES = ("vision_config", "audio_config", "visual")
_OTHERS = {  # fields of architectures that a model_type does not tell
    "is_encoder_decoder": "an encoder and a decoder",
    "routed_expert_hidden_size": "experts behind projections, and attention with residuals of its own",
    "block_configs": "layers of different sizes",
    "cross_attention_layers": "cross-attention to images",
}
_DTYPES = ("bfloat16", "float16", "float32")
LEFT_OUT = "images and audio are left out: the text model alone is simulated, without its encoders' weights"


def shape_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a ``ModelShape``, all but its name.

    Raises:
        InputError: field missing or not a positive integer, architecture or quantisation that is not
        modelled.
    """
    tower = vision_tower(config)
    config, notes = _text_part(config, where)
    notes = () if tower is not None else notes
    model_type = str(config.get("model_type"))
    family = _family(config, where)
    config = family.rename(config)
    file = ConfigFile(config, where)
    layers, heads = number_of_layers(file), file.count("num_attention_heads")
    hidden = file.count("hidden_size")
    _check_dtype(config, where)
    quantization = read_quantization(config, where)
    plan = _plan(file, family, layers, hidden)
    with_experts = (
        _no_mixture(file, model_type) if family.experts is None else _with_experts(file, family, plan)
    )
    mixture = _mixture(file, family.experts, len(with_experts)) if family.experts and with_experts else {}
    dense = [at for at in range(layers) if at not in with_experts and plan.dense(at)]
    dense_width = family.experts.dense_width if family.experts and with_experts else "intermediate_size"
    intermediate = file.count(dense_width) if dense or dense_width in config else 1
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "layers": layers,
        "heads": heads,
        "vocab_size": file.count("vocab_size"),
        "tied_embeddings": bool(config.get("tie_word_embeddings", family.tied)),
        "qkv_bias": file.says(family.qkv_bias),
        "out_bias": file.says(family.out_bias),
        "mlp_bias": file.says(family.mlp_bias),
        "mlp_products": 3 if family.gated else 2,
        "qk_norm": family.qk_norm != "no" and file.says(family.qk_norm_field or True),
        "norms_per_layer": config[family.norms] if isinstance(family.norms, str) else family.norms,
        "qk_norm_over_ranks": family.qk_norm == "all" and file.says(family.qk_norm_field or True),
        "kv_bytes_each": quantization.kv_bytes or 2,
        **mixture,
        **_mixers(plan),
        "order": _order(plan, set(with_experts), set(dense)),
        "mlp_layers": None if len(dense) + len(with_experts) == layers else len(dense),
        "mtp_layers": file.amount(
            "num_nextn_predict_layers",
            "mtp_num_hidden_layers",
            default=model_type == "qwen3_next",  # Qwen3NextMultiTokenPredictor
        ),
        "model_type": model_type,
        "tower": tower,
        **_positions(file),
    }
    sizes["other_weights"] = _other_weights(file, family, sizes)
    formats = _formats(quantization, plan, sizes, dense, with_experts)
    notes += tuple(dict.fromkeys(formats.pop("notes")))
    return sizes | formats | {"notes": notes}


@dataclass(frozen=True, slots=True)
class _Plan:
    """Of every layer: its type in the words of ``layer_types``, and how it mixes tokens."""

    names: list[str]
    mixers: list[Mixer | None]

    def dense(self, layer: int) -> bool:
        """Whether a layer without experts has an MLP: Nemotron-H's have that or a mixer."""
        return self.mixers[layer] is None or None not in self.mixers


def _plan(file: ConfigFile, family: Family, layers: int, hidden: int) -> _Plan:
    if family.compressed:
        return _Plan(["compressed"] * layers, compressed(file, layers, hidden))
    names = layer_names(file, family, layers)
    return _Plan(names, mixers(file, family, names, hidden))


def _order(plan: _Plan, with_experts: set[int], dense: set[int]) -> tuple[tuple[int, bool, bool], ...]:
    """``ModelShape.order``."""
    kinds = list(dict.fromkeys(mixer for mixer in plan.mixers if mixer is not None))
    order = tuple(
        (-1 if mixer is None else kinds.index(mixer), at in with_experts, at in dense)
        for at, mixer in enumerate(plan.mixers)
    )
    return order if len(set(order)) > 1 else ()


def _mixers(plan: _Plan) -> dict[str, Any]:
    """The mixers of a shape, or the fields that stand for them where all layers attend alike, but for a
    window."""
    kinds: dict[Mixer, int] = {}
    for mixer in plan.mixers:
        if mixer is not None:
            kinds[mixer] = kinds.get(mixer, 0) + 1
    found = tuple(replace(mixer, count=count) for mixer, count in kinds.items())
    attending = [mixer for mixer in found if mixer.attends] or list(found)
    main = next((mixer for mixer in attending if mixer.kind == "full"), attending[0]) if found else None
    if main is None:
        raise InputError(
            "no layer mixes tokens",
            where="config.json: layer_types",
            fix="Take the file from the model's repository.",
        )
    sliding = [mixer for mixer in found if mixer.kind == "sliding"]
    plain = all(
        replace(mixer, kind="full", count=1, window=0) == replace(main, kind="full", count=1, window=0)
        and mixer.kind in ("full", "sliding")
        and mixer.value_dim == mixer.head_dim
        for mixer in found
    )
    return {
        "kv_heads": main.kv_heads,
        "head_dim": main.head_dim,
        "sliding_window": sliding[0].window if sliding else 0,
        "sliding_layers": sum(mixer.count for mixer in sliding),
        "sliding_first": found[0].kind == "sliding" or not sliding,
        "mixers": () if plain and None not in plan.mixers else found,
    }


def _text_part(config: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The text model's fields, and a note if there is more than text."""
    text = config.get("text_config")
    if config.get("model_type") in NOT_MODELLED:
        _family(config, where)
    if isinstance(text, Mapping):
        if "model_type" not in text:
            raise InputError(
                f"text_config = {short(text)} names no model_type",
                where=f"{where}: text_config",
                fix="Take the file from the model's repository.",
            )
        shared = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")
        outer = {name: config[name] for name in shared if config.get(name) is not None}
        return {**outer, **text}, (LEFT_OUT,)
    return config, (LEFT_OUT,) if any(config.get(name) for name in _SEES) else ()


def _family(config: Mapping[str, Any], where: str) -> Family:
    model_type = str(config.get("model_type") or "")
    what = NOT_MODELLED.get(model_type) or next(
        (why for field, why in _OTHERS.items() if config.get(field)), None
    )
    if what:
        raise InputError(
            f"models of type {model_type!r} are not modelled: {what}",
            where=f"{where}: model_type",
            fix="Use a model of another family; servecast models lists them.",
        )
    found = FAMILIES.get(ALIASES.get(model_type, model_type))
    if found is None:
        near = did_you_mean(model_type, (*FAMILIES, *ALIASES)) if model_type else ""
        raise InputError(
            f"model_type {model_type!r} is not modelled" if model_type else "model_type is missing",
            where=f"{where}: model_type",
            fix=f"{near} servecast models lists the families that are.".strip(),
        )
    return found


def _no_mixture(file: ConfigFile, model_type: str) -> list[int]:
    """Of a dense family, whose config must not speak of experts."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if file.config.get(name) not in (None, 0, 1):
            raise InputError(
                f"{name} = {short(file.config[name])}, but models of type {model_type!r} have no experts",
                where=file.where,
                fix="Correct model_type, or remove the field.",
            )
    return []


def _with_experts(file: ConfigFile, family: Family, plan: _Plan) -> list[int]:
    """The layers that have experts."""
    experts = family.experts
    if experts is None or not next((file.config[name] for name in experts.count if file.config.get(name)), 0):
        if (
            experts is not None
            and file.amount(*experts.active)
            and not file.config.keys() & set(experts.count)
        ):
            raise InputError(
                f"there are {experts.active[0]}, but not how many experts there are",
                where=f"{file.where}: {experts.count[0]}",
                fix="Add the field.",
            )
        return []
    layers = len(plan.names)
    return [at for at in range(layers) if _has_experts(file, experts, at, layers, plan.names)]


def _mixture(file: ConfigFile, experts: Experts, layers: int) -> dict[str, int]:
    """The fields of a mixture of so many layers."""
    width = file.count(*experts.width)
    shared = file.amount(experts.shared) if experts.shared else 0
    if experts.shared_count and not shared:
        shared = width * file.amount(*experts.shared_count)
    count, active = file.count(*experts.count), file.count(*experts.active)
    if active > count:
        raise InputError(
            f"a token cannot use {active} of {count} experts",
            where=f"{file.where}: {experts.active[0]}",
            fix="Correct the file.",
        )
    return {
        "experts": count,
        "experts_per_token": active,
        "expert_intermediate_size": width,
        "shared_expert_size": shared,
        "expert_input_size": file.amount("moe_latent_size"),
        "moe_layers": layers,
    }


def _has_experts(file: ConfigFile, experts: Experts, layer: int, layers: int, names: list[str]) -> bool:
    config = file.config
    if experts.layers == "named":
        return names[layer] == "moe"
    if experts.layers == "steps":
        step = file.count("decoder_sparse_step", default=1)
        return layer not in file.listed("mlp_only_layers") and (layer + 1) % step == 0
    if experts.layers == "behind":
        listed = config.get("moe_layer_freq")
        if isinstance(listed, list):  # MiMo V2
            return layer < len(listed) and bool(listed[layer])
        return layer >= file.amount("first_k_dense_replace")
    if experts.layers == "interleaved":
        listed = file.listed("moe_layers")
        step = file.count("interleave_moe_layer_step", default=1)
        return layer in listed if listed else (layer + 1) % step == 0
    if experts.layers == "interval":
        first, last = file.amount("moe_layer_start_index"), layers - 1
        if config.get("moe_layer_end_index") != -1:
            last = file.amount("moe_layer_end_index", default=layers - 1)
        return first <= layer <= last and (layer + 1) % file.count("moe_layer_interval", default=1) == 0
    return True


def _other_weights(file: ConfigFile, family: Family, sizes: Mapping[str, Any]) -> int:
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
    if (
        family.compressed
    ):  # the hyper-connections' head; layers that choose experts by token have no correction
        streams = file.count("hc_mult")
        total += streams * (streams * hidden + 1) + 1 - file.amount("num_hash_layers") * sizes["experts"]
    total += file.count("max_position_embeddings") * hidden if file.config.get("learned_positions") else 0
    if sizes["mlp_bias"] and not family.gated:
        total -= layers * sizes["intermediate_size"]
    if family.experts is not None and sizes.get("moe_layers"):
        total += sizes["moe_layers"] * hidden if family.experts.shared_gate else 0
        total += sizes["moe_layers"] * sizes["experts"] if family.experts.router_bias else 0
        biases = sizes["experts"] * (2 * sizes["expert_intermediate_size"] + hidden)
        total += sizes["moe_layers"] * biases if family.experts.bias else 0
    return total


def _formats(
    quantization: Quantization,
    plan: _Plan,
    sizes: Mapping[str, Any],
    dense: Sequence[int],
    with_experts: Sequence[int],
) -> dict[str, Any]:
    """Bytes of a weight, and what most of them are stored as: of mixers, of MLPs and shared experts, and of
    routed experts, each on average over what is quantised and what is not."""
    hidden, products = sizes["hidden_size"], sizes["mlp_products"]
    names = ("gate_proj", "up_proj", "down_proj")[3 - products :]
    parts: dict[str, dict[Format, int]] = {"mixers": {}, "mlps": {}, "experts": {}}

    def add(part: str, module: str, weights: int) -> None:
        form = quantization.format_of(module)
        parts[part][form] = parts[part].get(form, 0) + weights

    for layer, mixer in enumerate(plan.mixers):
        for each in mixer.linears(hidden) if mixer else ():
            add("mixers", f"layers.{layer}.{each.module}", each.weights(1))
    for name in names:
        for layer in dense:
            add("mlps", f"layers.{layer}.mlp.{name}", hidden * sizes["intermediate_size"])
        for layer in with_experts:
            inputs = sizes["expert_input_size"] or hidden
            routed = sizes["experts"] * inputs * sizes["expert_intermediate_size"]
            add("experts", f"layers.{layer}.mlp.experts.0.{name}", routed)
            if sizes["shared_expert_size"]:
                add("mlps", f"layers.{layer}.mlp.shared_experts.{name}", hidden * sizes["shared_expert_size"])
    average = {
        part: _tidy(sum(form.weight_bytes * count for form, count in found.items()) / sum(found.values()))
        for part, found in parts.items()
        if found
    }
    shared = {
        form: parts["mixers"].get(form, 0) + parts["mlps"].get(form, 0)
        for part in ("mixers", "mlps")
        for form in parts[part]
    }
    everything = {**shared, **parts["experts"]}
    mlps = average.get("mlps", average.get("mixers", 2))
    experts = average.get("experts", mlps)
    blocks = [form.block for form in everything if form.block]
    return {
        "weight_bytes_each": mlps,
        "attention_bytes_each": None if average.get("mixers", mlps) == mlps else average["mixers"],
        "expert_bytes_each": None if experts == mlps else experts,
        "linear_format": _most(shared),
        "expert_format": _most(parts["experts"]),
        "weight_block": max(blocks, default=0),
        "least_capability": quantization.capability,
        "quant_method": quantization.method,
        "notes": [form.note for form in everything if form.note],
    }


def _most(found: Mapping[Format, int]) -> str:
    """The dtype of most of the weights; "" for plain ones, which the bytes say."""
    most = max(found, key=lambda form: found[form], default=SIXTEEN)
    return "" if most is SIXTEEN else most.dtype


def _tidy(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _positions(file: ConfigFile) -> dict[str, int | None]:
    """The longest context: the file's positions, if it has some, stretched as its RoPE says.

    Under YaRN a file may say the stretched length or the original one: vLLM takes the original times the
    factor, from 0.32 on what max_position_embeddings says. Under LongRoPE the default is the original
    length.
    """
    config = file.config
    if config.get("max_position_embeddings") is None:
        return {}
    positions = file.count("max_position_embeddings")
    found: dict[str, int | None] = {"max_position_embeddings": positions}
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    rope = rope if isinstance(rope, Mapping) else {}
    for each in [each for each in rope.values() if isinstance(each, Mapping)] or [rope]:
        kind = each.get("rope_type", each.get("type", "default"))
        stretch = each.get("factor") or 1.0
        if not isinstance(stretch, int | float) or not 0 < stretch < 1e6:
            raise InputError(
                f"factor is {short(stretch)}, not a positive number",
                where=f"{file.where}: rope_scaling.factor",
                fix="Take the file from the model's repository.",
            )
        original = each.get("original_max_position_embeddings") or config.get(
            "original_max_position_embeddings"
        )
        original = original if isinstance(original, int) and 0 < original <= LARGEST else None
        if kind == "yarn":
            found["yarn_positions"] = int((original or positions) * stretch)
        elif kind == "longrope":
            found["default_positions"] = original
        elif kind in ("linear", "dynamic") and "gemma3" not in str(config.get("model_type")):
            found["max_position_embeddings"] = int(positions * float(stretch))
    return found


def _check_dtype(config: Mapping[str, Any], where: str) -> None:
    """Of two bytes, whatever it is: vLLM's --dtype auto casts float32 weights down to half precision."""
    dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    if dtype not in _DTYPES:
        raise InputError(
            f"torch_dtype {dtype!r} is not known",
            where=f"{where}: torch_dtype",
            fix=f"Use {', '.join(_DTYPES)}.",
        )
