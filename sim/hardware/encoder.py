"""What a vision tower takes on a deployment's GPUs: seconds a step, and memory of one rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from servecast.sim.engine.request import MediaItem
from servecast.sim.hardware.layer_kinds import Mixer
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.profile import Profile
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import PhysicalStepTime
from servecast.sim.hardware.vision_tower import Modality, Picture, VisionTower
from servecast.sim.inputs.errors import InputError

MODALITIES: tuple[Modality, ...] = ("image", "video")


@dataclass(frozen=True, slots=True)
class EncoderRun:
    """Bytes of one rank: the tower's weights, and in vLLM's profile run of the largest items its outputs,
    which stay, and the peak of the run itself."""

    weights: int
    outputs: int
    peak: int
    note: str


@dataclass(frozen=True, slots=True)
class EncoderBudget:
    """Embeddings of the largest item, and of all that one step may encode, which is also what is kept
    (compute_mm_encoder_budget). largest: that item; None where prompts may carry none."""

    most: int
    budget: int
    largest: Picture | None


def encoder_budget(
    tower: VisionTower,
    limits: Mapping[str, int],
    max_num_batched_tokens: int,
    max_model_len: int,
    *,
    disable_chunked_mm_input: bool,
) -> EncoderBudget:
    """What a step may encode, by the limits of each modality in a prompt.

    Raises:
        InputError: the largest item is never split, and no step has room for it.
    """
    found = [
        item
        for modality in MODALITIES
        if limits.get(modality, 1) > 0 and (item := tower.largest(modality, max_model_len)) is not None
    ]
    if not found:
        return EncoderBudget(0, 0, None)
    largest = max(found, key=lambda item: item.embeds)
    if disable_chunked_mm_input and largest.embeds > max_num_batched_tokens:
        raise InputError(
            f"an item may have {largest.embeds} tokens, and is never split over steps of "
            f"{max_num_batched_tokens}",
            where="engine.disable_chunked_mm_input",
            fix="Raise max_num_batched_tokens, or lower limit_mm_per_prompt: vLLM refuses this.",
        )
    return EncoderBudget(largest.embeds, max(max_num_batched_tokens, largest.embeds), largest)


def encoder_run(
    tower: VisionTower, budget: EncoderBudget, shard: Shard, *, whole: bool, profiled: bool
) -> EncoderRun:
    """Its bytes on one rank.

    Args:
        whole: each rank has all of it, and some of the items (``--mm-encoder-tp-mode data``).
        profiled: vLLM encodes the largest items before it sizes the KV cache.
    """
    size, ranks = shard.model.dtype_bytes, 1 if whole else shard.tensor_parallel_size
    split = tower.layers * tower.layer_weights + tower.joining_weights
    weights = (tower.parameters - split + split // ranks) * size
    if not profiled or budget.largest is None:
        return EncoderRun(weights, 0, 0, "not profiled")
    items = max(1, budget.budget // budget.most)
    outputs = items * budget.most * tower.text_size * size
    hidden, wide = tower.hidden_size, tower.intermediate_size // ranks
    pixels = 3 * tower.frames_per_patch * tower.patch**2
    row = pixels + max(2 * hidden + 8 * hidden // ranks, 2 * hidden + tower.mlp_products * wide)
    peak = items * budget.largest.patches * row * size + outputs
    return EncoderRun(weights, outputs, peak, f"{items} items of {budget.most:,} tokens, as vLLM profiles it")


class EncoderTime:
    """Seconds that the tower takes for the items of a step: a prompt of as many patches through its blocks,
    by the efficiencies of the profile, in which all patches of a segment see each other. Never faster than
    the roofline; without what the step's own host time covers.

    Args:
        shard: of the text model. whole: see ``encoder_run``: then each rank encodes some of the items.
    """

    def __init__(self, tower: VisionTower, shard: Shard, profile: Profile, *, whole: bool) -> None:
        ranks = shard.tensor_parallel_size
        if tower.heads % ranks and not whole:
            raise InputError(
                f"a vision tower of {tower.heads} heads cannot be split {ranks} ways",
                where="engine.mm_encoder_tp_mode",
                fix="Use data, or fewer ranks.",
            )
        self._tower, self._ranks, self._whole = tower, ranks, whole
        model = _as_model(tower, shard.model)
        self._time = PhysicalStepTime(Shard(model, shard.gpu, 1 if whole else ranks), profile.efficiencies)
        layers = tower.layers * tower.layer_weights * (1 if tower.rule == "fixed" else tower.merge**2)
        self._joining = tower.joining_weights / layers  # its products' share of those of the layers
        self._known: dict[tuple[tuple[int, int], ...], float] = {}

    def seconds(self, items: Iterable[MediaItem]) -> float:
        """For the items of one step."""
        shapes = tuple(sorted(((item.patches, item.segments) for item in items), reverse=True))
        if shapes not in self._known:
            self._known[shapes] = max(self._of(part) for part in self._shares(shapes))
        return self._known[shapes]

    def _shares(self, shapes: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """What each rank encodes: the next largest item goes to the one with the fewest patches
        (get_load_balance_assignment)."""
        if not self._whole:
            return [list(shapes)]
        shares: list[list[tuple[int, int]]] = [[] for _ in range(self._ranks)]
        for shape in shapes:
            min(shares, key=lambda share: sum(patches for patches, _ in share)).append(shape)
        return shares

    def _of(self, shapes: Sequence[tuple[int, int]]) -> float:
        if not shapes:
            return 0.0
        chunks = [
            (patches // segments, (patches // segments - 1) // 2)  # as many pairs as all with all
            for patches, segments in shapes
            for _ in range(segments)
        ]
        step: Any = SimpleNamespace(chunks=chunks, decodes=0, decode_context=0, samples=0)
        parts = dict(self._time.breakdown(step))
        efficiencies = self._time.efficiencies
        host = efficiencies.host_fixed_s + len(chunks) * efficiencies.host_per_seq_s
        return sum(parts.values()) - min(host, parts["host"]) + parts["linear"] * self._joining


def _as_model(tower: VisionTower, text: ModelShape) -> ModelShape:
    """The tower's blocks as a model of text: layers of full attention and of windows."""
    head = tower.hidden_size // tower.heads
    full = Mixer(
        kind="full",
        count=tower.full_layers,
        heads=tower.heads,
        kv_heads=tower.heads,
        head_dim=head,
        value_dim=head,
    )
    windows = replace(full, kind="sliding", count=tower.layers - tower.full_layers, window=tower.window)
    return ModelShape(
        f"{text.name}'s vision tower",
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        layers=tower.layers,
        heads=tower.heads,
        kv_heads=tower.heads,
        head_dim=head,
        vocab_size=1,
        tied_embeddings=True,
        mlp_products=tower.mlp_products,
        dtype_bytes=text.dtype_bytes,
        mixers=tuple(mixer for mixer in (full, windows) if mixer.count),
    )
