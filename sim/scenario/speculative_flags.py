"""``--speculative-config`` as vLLM takes it: its fields by release, and what vLLM refuses of them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from servecast.sim.engine.rules import minor_release, since
from servecast.sim.engine.speculation import METHODS
from servecast.sim.inputs.schema import Count, Flag, Model, invalid

MTP_NAMES = (  # MTPModelTypes, which vLLM runs as ``mtp``
    *("deepseek_mtp", "mimo_mtp", "mimo_v2_mtp", "glm4_moe_mtp", "glm4_moe_lite_mtp", "glm_ocr_mtp"),
    *("ernie_mtp", "nemotron_h_mtp", "exaone_moe_mtp", "exaone4_5_mtp", "qwen3_next_mtp", "qwen3_5_mtp"),
    *("longcat_flash_mtp", "pangu_ultra_moe_mtp", "step3p5_mtp", "hy_v3_mtp", "gemma4_mtp", "minimax_m3_mtp"),
    *("bailing_hybrid_mtp", "bailing_hybrid_v3_mtp", "inkling_mtp", "kimi_k3_mtp", "dots3_note_mtp"),
    *("qwen4_exp_mtp", "hy_v4_mtp", "glm5_next_mtp", "step5_mtp"),
)
_REFUSED_METHODS = {
    "custom_class": "A proposer of one's own is code whose time and drafts nothing here tells.",
    "extract_hidden_states": "It drafts nothing: it hands hidden states out.",
}
_SINCE = {  # fields and values that not every release has
    "attention_backend": "0.21",
    "draft_sample_method": "0.21",
    "num_speculative_tokens_per_batch_size": "0.24",
    "use_heterogeneous_vocab": "0.25",
    "dspark": "0.25",
    "block": "0.25",
    "kv_cache_dtype": "0.26",
    "enable_adaptive_verification": "0.28",
    "dspark_draft_topk": "0.28",
    "index_share_for_mtp_iteration": "0.29",
    "disable_eagle_block_drop": "0.30",
    "disable_lookahead_block_hashes": "0.33",
    "draft_lm_head_quantization": "0.33",
}
_UNTIL = {"medusa": "0.32", "mlp_speculator": "0.32"}
_DEFAULTS_TO_ASYNC = {"draft_model": "0.28"}  # before, it turned async scheduling off unless asked for
_UNTOLD = (  # change kernels or memory in ways that only widen the error band
    *(
        "enforce_eager",
        "moe_backend",
        "attention_backend",
        "use_local_argmax_reduction",
        "draft_sample_method",
    ),
    *("index_share_for_mtp_iteration", "dspark_draft_topk", "draft_lm_head_quantization"),
    "disable_lookahead_block_hashes",
)
_LOOKS_UP = ("ngram", "ngram_gpu")


class SpeculativeConfig(Model):
    """``--speculative-config``: how drafts are proposed and verified. Fields have vLLM's names; how many
    drafts are accepted is the scenario's ``acceptance``."""

    method: str | None = None
    """``ngram``, ``ngram_gpu``, ``suffix``, ``eagle``, ``eagle3``, ``mtp`` (or a family's name of it),
    ``draft_model``, ``dflash``, ``dspark``, ``medusa`` or ``mlp_speculator``. Default: as vLLM tells it by
    the drafter's name, else ``draft_model``."""
    model: str | None = None
    """The drafter: a shipped config's name, a ``config.json`` or its folder, or a Hub id that lies in the
    cache of this machine. Where there is no config of an EAGLE head, it is taken to be one layer as the
    target's."""
    num_speculative_tokens: Count | None = None
    """Drafts a step, k. Default, for MTP, the number of its layers; for suffix, its tree's depth."""
    num_speculative_tokens_per_batch_size: tuple[tuple[Count, Count, int], ...] | None = None
    """Drafts by the number of requests in a step: first, last, drafts (from 0.24 on)."""
    draft_tensor_parallel_size: Count | None = None
    """Ranks of the drafter: 1, or the target's, which is the default."""
    quantization: str | None = None
    """Of the drafter's weights, as ``--quantization``."""
    kv_cache_dtype: str | None = None
    """Of the drafter's KV cache (from 0.26 on). Default, the target's."""
    max_model_len: Count | None = None
    """Longest context that the drafter drafts for. Less than the target's is refused."""
    parallel_drafting: Flag = False
    """All drafts in one pass (P-EAGLE, PARD)."""
    disable_padded_drafter_batch: Flag = False
    """Turns async scheduling off."""
    disable_eagle_block_drop: Flag = False
    """Keep the last block of a prefix hit (from 0.30 on)."""
    prompt_lookup_max: Count | None = None
    """Longest n-gram that is looked up."""
    prompt_lookup_min: Count | None = None
    """Shortest."""
    suffix_decoding_max_tree_depth: int = 24
    """Default of ``num_speculative_tokens`` for suffix."""
    suffix_decoding_max_cached_requests: int = 10000
    """Told by the ``acceptance`` that was measured with it, as the two that follow."""
    suffix_decoding_max_spec_factor: float = 1.0
    """See above."""
    suffix_decoding_min_token_prob: float = 0.1
    """See above."""
    rejection_sample_method: Literal["standard", "strict", "probabilistic", "synthetic", "block"] = "standard"
    """``synthetic`` says the acceptance itself, by the two that follow."""
    synthetic_acceptance_rates: tuple[float, ...] | None = None
    """Probabilities that the first 1, 2, .. k drafts are all accepted."""
    synthetic_acceptance_length: float | None = None
    """Mean tokens of a step, with least variance."""
    draft_sample_method: str | None = None
    """Widens the error band, as those that follow down to ``disable_lookahead_block_hashes``."""
    enforce_eager: Flag | None = None
    """See above."""
    moe_backend: str | None = None
    """See above."""
    attention_backend: str | None = None
    """See above."""
    use_local_argmax_reduction: Flag = False
    """See above."""
    index_share_for_mtp_iteration: Flag | None = None
    """See above."""
    dspark_draft_topk: Count | None = None
    """See above."""
    draft_lm_head_quantization: str | None = None
    """See above."""
    disable_lookahead_block_hashes: Flag = False
    """See above."""
    use_heterogeneous_vocab: Flag = False
    """A drafter of another vocabulary: of ``draft_model`` only."""
    enable_adaptive_verification: Flag = False
    """Refused: how many drafts it verifies goes by the drafter's confidence."""
    revision: str | None = None
    """Without effect, as ``code_revision`` and ``draft_load_config``."""
    code_revision: str | None = None
    """See above."""
    draft_load_config: dict[str, Any] | None = None
    """See above."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {key.replace("-", "_") if isinstance(key, str) else key: each for key, each in data.items()}
        if data.get("tensor_parallel_size") is not None:
            fix = "Write draft_tensor_parallel_size: vLLM refuses this name."
            raise invalid("tensor_parallel_size is not the drafter's", fix, at="tensor_parallel_size")
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> SpeculativeConfig:
        method, low, high = self.kind, self.prompt_lookup_min, self.prompt_lookup_max
        if method in _REFUSED_METHODS or method not in METHODS:
            known = f"Known: {', '.join(METHODS)}."
            what = f"drafts by {method!r} cannot be simulated"
            raise invalid(what, _REFUSED_METHODS.get(method, known), at="method")
        if method in _LOOKS_UP and low and high and low > high:
            fix = "Give prompt_lookup_min <= prompt_lookup_max: vLLM refuses this."
            raise invalid(f"prompt_lookup_min {low} is above {high}", fix, at="prompt_lookup_min")
        if self.enable_adaptive_verification:
            fix = "Leave it out: the number of drafts would go by the drafter's confidence."
            raise invalid("adaptive verification is not modelled", fix, at="enable_adaptive_verification")
        if self.use_heterogeneous_vocab and method != "draft_model":
            fix = "Leave it out: vLLM takes it for draft_model only."
            raise invalid(f"another vocabulary for {method}", fix, at="use_heterogeneous_vocab")
        if (
            method in ("eagle", "eagle3", "draft_model", "dflash", "medusa", "mlp_speculator")
            and not self.model
        ):
            raise invalid(f"{method} without a model", "Give model, the drafter.", at="model")
        if self.parallel_drafting and method not in ("eagle", "eagle3", "draft_model", "dflash", "dspark"):
            fix = "Leave it out: EAGLE and draft models can be trained for it."
            raise invalid(f"parallel drafting with {method}", fix, at="parallel_drafting")
        given = (self.synthetic_acceptance_rates is None) + (self.synthetic_acceptance_length is None)
        if given != (1 if self.rejection_sample_method == "synthetic" else 2):
            fix = "Give rejection_sample_method synthetic with a length or rates, or none of them."
            raise invalid("synthetic acceptance does not fit together", fix, at="rejection_sample_method")
        self.by_batch()
        return self

    @property
    def kind(self) -> str:
        """The method, as vLLM tells it (SpeculativeConfig.__post_init__)."""
        model = (self.model or "").lower()
        if self.method in MTP_NAMES:
            return "mtp"
        if self.method == "[ngram]" or (self.method is None and model in ("ngram", "[ngram]")):
            return "ngram"
        if self.method not in (None, "draft_model"):
            return str(self.method)
        told = {"eagle-": "eagle", "eagle3": "eagle3", "dflash": "dflash", "dspark": "dspark"}
        return next((method for part, method in told.items() if part in model), "draft_model")

    def by_batch(self) -> tuple[tuple[int, int], ...]:
        """(first number of requests, drafts) of the dynamic schedule (dynamic/utils.py): gaps and the tail
        take the drafts of the range before."""
        ranges = sorted(self.num_speculative_tokens_per_batch_size or ())
        last = 0
        for first, end, drafts in ranges:
            if first <= last or end < first or drafts < 0:
                fix = "Give ranges first, last, drafts that rise and do not overlap: vLLM refuses the rest."
                at = "num_speculative_tokens_per_batch_size"
                raise invalid(f"[{first}, {end}, {drafts}] does not fit", fix, at=at)
            last = end
        if ranges and ranges[0][0] != 1:
            fix = "Begin the first range with 1: vLLM refuses the rest."
            raise invalid("the smallest batch has no drafts", fix, at="num_speculative_tokens_per_batch_size")
        return tuple((first, drafts) for first, _, drafts in ranges)

    def check(self, version: str) -> None:
        """Raise ``schema.invalid`` where a release has no such field or method."""
        release = minor_release(version)
        fields = type(self).model_fields
        given = [name for name in self.model_fields_set if getattr(self, name) != fields[name].default]
        for name in (*given, self.kind, self.rejection_sample_method):
            if name in _SINCE and not since(release, _SINCE[name]):
                raise invalid(f"vLLM {version} has no {name}", f"Use version {_SINCE[name]}.", at=name)
            if name in _UNTIL and since(release, "0.33"):
                fix = f"Use version {_UNTIL[name]}, or another method."
                raise invalid(f"vLLM {version} has no {name} any more", fix, at="method")

    def runs_async(self, version: str, asked: bool | None, default: bool) -> bool:
        """Whether async scheduling is on, ``asked`` for or not (VllmConfig.__post_init__).

        Raises:
            As validators do: it is asked for where vLLM refuses it.
        """
        able = METHODS[self.kind].async_by_default and not self.disable_padded_drafter_batch
        if asked and not able:
            why = (
                f"{self.kind} drafts"
                if not METHODS[self.kind].async_by_default
                else "unpadded drafter batches"
            )
            fix = "Leave async_scheduling out: vLLM refuses the two together."
            raise invalid(f"async scheduling with {why}", fix, at="async_scheduling")
        usual = since(minor_release(version), _DEFAULTS_TO_ASYNC.get(self.kind, "0.10"))
        return able and (default and usual if asked is None else asked)

    @property
    def widening(self) -> tuple[str, ...]:
        """Fields that change time or memory in ways that only widen the error band."""
        nothing = (None, False, "greedy", "auto")
        return tuple(name for name in _UNTOLD if getattr(self, name) not in nothing)
