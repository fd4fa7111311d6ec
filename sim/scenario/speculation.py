"""What a scenario's ``--speculative-config`` comes to: the scheduler's part, the drafter, and acceptance."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from servecast.sim.engine.draft_rules import draft_rules_for
from servecast.sim.engine.kv_groups import group_kind
from servecast.sim.engine.rules import minor_release, since
from servecast.sim.engine.speculation import METHODS, Speculation, by_modules, speculation
from servecast.sim.hardware.drafter import LOOKUPS, Drafter, Passes, eagle_shape, mtp_shape
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.acceptance import Law, least_variance, missing
from servecast.sim.scenario.acceptance_spread import always_proposed
from servecast.sim.scenario.scenario import Scenario, shipped_folder
from servecast.sim.scenario.speculative_flags import SpeculativeConfig
from servecast.sim.scenario.vllm_flags import FLAG_BAND
from servecast.sim.scenario.vllm_server import RELEASES, release_of

TIME_BAND = 0.1  # assumed: no profile was fitted to a server that drafts
_V2_SINCE = "0.32"  # whose drafter from another model runs outside CUDA graphs
_SKIPS_SINCE = "0.33"  # no drafts for a step without requests that can use them


@dataclass(frozen=True, slots=True)
class Speculating:
    """How a deployment speculates.

    Attributes:
        config: what its scheduler knows. drafter: what drafts. law: what is accepted.
        skips: see ``SpeculativeStepTime``. notes: what a result should say of it. band: by how much it widens
            the relative error band of token times.
    """

    config: Speculation
    drafter: Drafter
    law: Law
    skips: bool
    notes: tuple[str, ...]
    band: float

    def length(self, requests: int) -> int:
        """Drafts that each request gets after a step of so many, at most."""
        found = self.config.num_tokens
        for first, drafts in self.config.by_batch:
            found = min(drafts, self.config.num_tokens) if requests >= first else found
        return found

    @property
    def keeps_pace(self) -> bool:
        """Whether engine cores can draft in lockstep: each the same number of passes, one after the other
        where they share the drafter's experts."""
        drafter = self.drafter
        shared = drafter.shape is not None and drafter.shape.moe_layers > 0
        return not self.config.by_batch and not (shared and (drafter.slots or drafter.passes != "one by one"))

    def facts(self) -> dict[str, Any]:
        """What a result says of it."""
        return {
            "method": self.config.method,
            "num_tokens": self.config.num_tokens,
            "acceptance": list(self.law.rates),
            "proposed": list(self.law.proposed),
            "acceptance_length": self.law.length,
            "origin": self.law.origin,
            "note": self.law.note,
        }


def speculating(scenario: Scenario, target: ModelShape) -> Speculating | None:
    """How a scenario's engine speculates; None if it does not.

    Raises:
        InputError: vLLM would refuse it, nothing says how many drafts are accepted, or the drafter's sizes
            are not known.
    """
    flags, asked = scenario.engine, scenario.engine.speculative_config
    where = f"{scenario.source}: engine.speculative_config"
    if asked is None:
        if scenario.acceptance is not None:
            fix = "Leave it out, or give engine.speculative_config."
            raise InputError("nothing is drafted", where=f"{scenario.source}: acceptance", fix=fix)
        return None
    method, notes = asked.kind, list[str]()
    if method in ("medusa", "mlp_speculator"):
        raise InputError(
            f"the heads of {method} are not modelled",
            where=f"{where}.method",
            fix="Use another method: vLLM 0.33 has it no more.",
        )
    drafts = _number_of_drafts(asked, target, where)
    drafter = _drafter(scenario, asked, target, drafts, where, notes)
    law = _law(scenario, asked, drafts)
    given = asked.synthetic_acceptance_length or asked.synthetic_acceptance_rates
    if given is not None and scenario.acceptance is None:
        law = _synthetic(asked, drafts, where)
    rules = RELEASES[release_of(flags)].rules
    config = speculation(
        rules,
        method,
        drafts,
        law.rates,
        parallel_drafting=asked.parallel_drafting,
        disable_eagle_block_drop=asked.disable_eagle_block_drop,
        by_batch=tuple((first, min(more, drafts)) for first, more in asked.by_batch()),
        proposed=law.proposed if METHODS[method].may_miss else (),
        kinds=law.kinds
        if METHODS[method].may_miss
        else always_proposed(law.kinds, (law.rates, law.proposed)),
        seed=scenario.seed,
    )
    config = by_modules(config, rules, target.mtp_layers if asked.model is None else 1)
    if method == "mtp" and drafter.shape is not None and draft_rules_for(rules).flags_mtp_group:
        kinds = {group_kind(layer.kind) for layer in drafter.shape.cache_layers}
        config = replace(config, drafter_kinds=tuple(sorted(kinds)))
    given_shares = scenario.acceptance is not None and scenario.acceptance.proposed is not None
    if given_shares and not METHODS[method].may_miss:
        raise InputError(
            f"drafts of {method} are always proposed",
            where=f"{scenario.source}: acceptance.proposed",
            fix="Leave it out: it is of drafts that are looked up (ngram, ngram_gpu, suffix).",
        )
    if law.origin != "given":
        notes.append(law.note)
    if asked.widening:
        names = ", ".join(asked.widening)
        notes.append(f"not modelled of speculative_config, and {FLAG_BAND:.0%} more error for each: {names}")
    return Speculating(
        config=config,
        drafter=drafter,
        law=law,
        skips=since(minor_release(flags.version), _SKIPS_SINCE) and config.lookahead > 0,
        notes=tuple(notes),
        band=TIME_BAND + law.band + FLAG_BAND * len(asked.widening),
    )


def _number_of_drafts(asked: SpeculativeConfig, target: ModelShape, where: str) -> int:
    """``num_speculative_tokens``, or what vLLM takes without it."""
    drafts, layers = asked.num_speculative_tokens, target.mtp_layers
    if asked.kind == "mtp" and asked.model is None and layers:
        drafts = drafts or layers
        if drafts > layers and drafts % layers:
            raise InputError(
                f"{drafts} drafts of {layers} layers for multi-token prediction",
                where=f"{where}.num_speculative_tokens",
                fix=f"Use a multiple of {layers}: vLLM refuses this.",
            )
    if asked.kind == "suffix":
        drafts = drafts or asked.suffix_decoding_max_tree_depth
    if drafts is None:
        raise InputError(
            "nothing says how many tokens are drafted",
            where=f"{where}.num_speculative_tokens",
            fix="Give it: vLLM asks for it.",
        )
    return drafts


def _law(scenario: Scenario, asked: SpeculativeConfig, drafts: int) -> Law:
    where = f"{scenario.source}: acceptance"
    if scenario.acceptance is None:
        if asked.rejection_sample_method == "synthetic":
            return _synthetic(asked, drafts, f"{scenario.source}: engine.speculative_config")
        raise replace_where(missing(asked.kind), where)
    law = scenario.acceptance.law(drafts, shipped_folder() / "acceptance", where)
    if METHODS[asked.kind].may_miss and not law.proposed and law.origin == "assumed":
        raise InputError(
            f"how often {asked.kind} finds something to propose goes by the texts, and is not assumed",
            where=where,
            fix="Measure it (acceptance.metrics), or give acceptance.rate and acceptance.proposed.",
        )
    return law


def replace_where(error: InputError, where: str) -> InputError:
    """The same about another field."""
    return InputError(error.what, where=where, fix=error.fix)


def _synthetic(asked: SpeculativeConfig, drafts: int, where: str) -> Law:
    """What rejection_sample_method synthetic accepts (_resolve_synthetic_acceptance_rates)."""
    rates, length = asked.synthetic_acceptance_rates, asked.synthetic_acceptance_length
    if length is not None:
        if not 1.0 <= length <= drafts + 1:
            fix = f"Give 1 to {drafts + 1}: vLLM refuses the rest."
            what = f"synthetic_acceptance_length {length:g} of {drafts} drafts"
            raise InputError(what, where=f"{where}.synthetic_acceptance_length", fix=fix)
        return Law(least_variance(length, drafts), note="synthetic_acceptance_length")
    assert rates is not None
    falls = list(rates) == sorted(rates, reverse=True) and all(0.0 <= rate <= 1.0 for rate in rates)
    if len(rates) != drafts or not falls:
        fix = f"Give {drafts} probabilities, none above the one before: vLLM refuses the rest."
        raise InputError(
            f"synthetic_acceptance_rates {list(rates)}", where=f"{where}.synthetic_acceptance_rates", fix=fix
        )
    return Law(rates, note="synthetic_acceptance_rates")


def _drafter(
    scenario: Scenario,
    asked: SpeculativeConfig,
    target: ModelShape,
    drafts: int,
    where: str,
    notes: list[str],
) -> Drafter:
    """What drafts; notes are added to ``notes``."""
    flags, method = scenario.engine, asked.kind
    ranks = asked.draft_tensor_parallel_size or flags.tensor_parallel_size
    if ranks not in (1, flags.tensor_parallel_size):
        raise InputError(
            f"a drafter on {ranks} of {flags.tensor_parallel_size} ranks",
            where=f"{where}.draft_tensor_parallel_size",
            fix=f"Use 1 or {flags.tensor_parallel_size}: vLLM refuses the rest.",
        )
    if method in LOOKUPS:
        return Drafter(method, None)
    infills = METHODS[method].parallel
    passes: Passes = "infill" if infills else "at once" if asked.parallel_drafting else "one by one"
    slots = {"infill": drafts if method == "dflash" else drafts - 1, "at once": drafts, "one by one": 0}[
        passes
    ]
    if method == "draft_model":
        slots = drafts if asked.parallel_drafting else 1
    elif passes == "at once":
        slots = drafts - 1
    file = _config_file(scenario, asked, method, where)
    head = None if file is None else _shape(file, asked, where)
    release = minor_release(flags.version)
    drafter = Drafter(
        method,
        target,
        ranks,
        passes,
        slots,
        kv_bytes=_kv_bytes(asked, where),
        eager=bool(asked.enforce_eager)
        or (method == "draft_model" and not asked.parallel_drafting and since(release, _V2_SINCE)),
    )
    if method == "draft_model":
        assert head is not None
        _check_model(asked, head, target, scenario, where, notes)
        if drafter.eager:
            notes.append(
                f"vLLM {flags.version} runs a draft model outside CUDA graphs: its passes wait for the host, "
                "which launches each kernel"
            )
        return replace(drafter, shape=head, own_embeddings=True, own_head=True)
    if method == "mtp" and head is None:
        return replace(drafter, shape=mtp_shape(target), loaded=max(1, min(target.mtp_layers, drafts)))
    if method == "mtp":
        assert head is not None
        return replace(drafter, shape=mtp_shape(head))
    if head is None:
        notes.append(f"the sizes of {asked.model} are not known: taken to be one layer as {target.name}'s")
    shape = eagle_shape(method, target, head)
    return replace(drafter, shape=shape, own_head=method == "eagle3" and head is not None)


def _kv_bytes(asked: SpeculativeConfig, where: str) -> int | None:
    given = asked.kv_cache_dtype
    if given in (None, "auto"):
        return None
    if given in ("bfloat16", "float16"):
        return 2
    if given in ("fp8", "fp8_e4m3", "fp8_e5m2"):
        return 1
    fix = "Use auto, bfloat16, float16 or fp8."
    raise InputError(f"kv_cache_dtype {given!r} is not modelled", where=f"{where}.kv_cache_dtype", fix=fix)


def _config_file(scenario: Scenario, asked: SpeculativeConfig, method: str, where: str) -> Path | None:
    """The drafter's config; None where the target's is it, or nothing is there of an EAGLE head."""
    if method == "mtp" and asked.model is None:
        return None
    if asked.model is None:
        raise InputError(
            f"the stages of {method} that ship in the target's checkpoint are not modelled",
            where=f"{where}.model",
            fix="Give the drafter's config.json as model.",
        )
    try:
        return scenario.config_file(asked.model, "engine.speculative_config.model")
    except InputError:
        if method in ("eagle", "eagle3"):
            return None
        raise


def _shape(file: Path, asked: SpeculativeConfig, where: str) -> ModelShape:
    """A drafter's sizes: an EAGLE head's logits are over a vocabulary of its own."""
    loaded: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    overrides: dict[str, Any] = {}
    if loaded.get("draft_vocab_size"):
        overrides["vocab_size"] = loaded["draft_vocab_size"]
    if isinstance(loaded.get("transformer_layer_config"), dict):  # the format of vLLM's speculators
        return ModelShape.from_config({**loaded["transformer_layer_config"], **overrides}, file.stem)
    shape = ModelShape.from_config(file, overrides=overrides)
    if asked.quantization in ("fp8", "bitsandbytes") and shape.quantised == "bf16":
        online = {"quant_method": asked.quantization, "load_in_4bit": True}
        return ModelShape.from_config(file, overrides={**overrides, "quantization_config": online})
    if asked.quantization is not None and not shape.quant_method:
        fix = "Use fp8 or bitsandbytes, or the config.json of quantised weights."
        raise InputError(
            f"quantization {asked.quantization!r} of plain weights", where=f"{where}.quantization", fix=fix
        )
    return shape


def _check_model(
    asked: SpeculativeConfig,
    model: ModelShape,
    target: ModelShape,
    scenario: Scenario,
    where: str,
    notes: list[str],
) -> None:
    """A draft model beside its target (verify_equal_vocab_size_if_draft_model)."""
    if model.vocab_size != target.vocab_size and not asked.use_heterogeneous_vocab:
        raise InputError(
            f"{model.name} has {model.vocab_size} tokens, {target.name} {target.vocab_size}",
            where=f"{where}.model",
            fix="Use a draft model of the same vocabulary: vLLM refuses this.",
        )
    if model.keeps_states:
        fix = "Use a draft model whose layers attend."
        raise InputError(f"{model.name} keeps states, which is not modelled", where=f"{where}.model", fix=fix)
    longest = model.max_position_embeddings
    served = scenario.engine.max_model_len
    if asked.max_model_len is not None:
        fix = "Leave it out: that drafts end there is not modelled."
        if not isinstance(served, int) or asked.max_model_len < served:
            raise InputError("a drafter of shorter contexts", where=f"{where}.max_model_len", fix=fix)
    if longest is not None and isinstance(served, int) and longest < served:
        notes.append(f"{model.name} drafts up to {longest:,} tokens; beyond, acceptance is taken to stay")
