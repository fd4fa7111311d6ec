"""The measured grid: exact at its nodes, fair between them, an error beyond; and the roofline holds."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_folder import CAPTURED, H200, physical_law, steps_of_grid, write_folder
from model_shapes import load
from step_cases import DEPLOYMENTS, SHAPES, Step, decode, efficiencies, steps

from servecast.calibrate.fit.folder import fit_folder
from servecast.calibrate.fit.measurements import read_folder
from servecast.sim.hardware.error_band import transfer
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.profile import Profile, build_step_time
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.grid import Grid, GridStepTime, Surface
from servecast.sim.hardware.step_time.physical import Efficiencies, PhysicalStepTime
from servecast.sim.inputs.errors import InputError

MODEL = "Qwen2.5-7B-Instruct"
SHAPE = load(MODEL)
# 20 ms, 0.1 ms a padded token, 1 us a KV token; contexts end where 4,000 KV tokens are held
SIZES = (1, 2, 4, 8, 16, 32)
GRID = Grid(
    gpu="H200",
    shape=SHAPE,
    cudagraph_sizes=SIZES,
    decode=tuple(
        (n, c, 0.02 + 1e-4 * n + 1e-6 * n * c)
        for n, contexts in ((1, (100, 2000)), (4, (100, 1000)), (16, (100, 250)), (32, (125,)), (8, (200,)))
        for c in contexts
    ),
    prefill=tuple(
        (k, x, 0.02 + 1e-4 * k + 1e-7 * k * x)
        for k, contexts in ((16, (0,)), (64, (0, 1000)), (256, (0, 1000)), (512, (0,)))
        for x in contexts
    ),
)
GRID_TIME = GridStepTime(GRID, Shard(SHAPE, H200, 1))


def prompt(tokens: int, context: int = 0) -> Step:
    return Step(chunks=((tokens, context),), samples=1)


def test_nodes_are_what_was_measured() -> None:
    for n, context, seconds in GRID.decode:
        assert GRID_TIME.seconds(decode(n, int(context))) == pytest.approx(seconds, rel=1e-9)
    for tokens, context, seconds in GRID.prefill:
        assert GRID_TIME.seconds(prompt(tokens, int(context))) == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize(
    ("step", "seconds"),
    [
        (decode(4, 550), 0.02 + 4e-4 + 4 * 550e-6),  # between contexts
        (decode(3, 800), 0.02 + 4e-4 + 3 * 800e-6),  # padded to 4; its KV is that of 3
        (decode(9, 200), 0.02 + 16e-4 + 9 * 200e-6),  # padded to 16
        (decode(10, 390), 0.02 + 16e-4 + 10 * 390e-6),  # beyond what 16 had: as many KV tokens in all
        (decode(32, 110), 0.02 + 32e-4 + 32 * 110e-6),  # above the last size with several contexts
        (prompt(384), 0.02 + 384e-4),
        (prompt(128, 500), 0.02 + 128e-4 + 1e-7 * 128 * 500),
        (prompt(8), 0.0202 + (7 / 15) * 0.0014),  # between one decode's time and the shortest prompt
        (prompt(32, 400), 0.0232 + 1e-7 * 64 * 400),  # as much for the context as the shortest that had one
    ],
)
def test_between_nodes(step: Step, seconds: float) -> None:
    assert GRID_TIME.seconds(step) == pytest.approx(seconds, rel=1e-2)


def test_mixed_steps_are_composed() -> None:
    mixed = Step(chunks=((64, 1000), (100, 0)), decodes=4, decode_context=4 * 600, samples=6)
    tokens, context, kv = 0.02 + 168e-4, 1e-7 * 64 * 1000, 4 * 500e-6
    assert GRID_TIME.seconds(mixed) == pytest.approx(tokens + context + kv, rel=1e-9)
    slower = GridStepTime(GRID.model_copy(update={"mixed_factor": 1.5}), Shard(SHAPE, H200, 1))
    assert slower.seconds(mixed) == pytest.approx(1.5 * GRID_TIME.seconds(mixed))
    assert slower.seconds(decode(4, 500)) == GRID_TIME.seconds(decode(4, 500))
    small = Step(chunks=((1, 0),), decodes=16, decode_context=16 * 250, samples=17)
    assert GRID_TIME.seconds(small) >= GRID_TIME.seconds(decode(16, 250))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (decode(33, 125), "profile: grid.decode: a step with decode batch 33; measured were 1 to 32"),
        (decode(4, 1100), "a step with context 1100 at decode batch 4; measured were 100 to 1000"),
        (decode(10, 410), "a step with context 410 at decode batch 10; measured were 100 to 400"),
        (decode(1, 50), "context 50 at decode batch 1; measured were 100 to 2000"),
        (prompt(513), "grid.prefill: a step with prefill tokens 513; measured were 1 to 512"),
        (prompt(128, 1001), "context 1001 at prefill tokens 128; measured were 0 to 1000"),
        (
            Step(chunks=((500, 0),), decodes=16, decode_context=1600, samples=17),
            "a step with prefill tokens 516; measured were 1 to 512",
        ),
    ],
)
def test_beyond_the_grid_is_an_error(step: Step, message: str) -> None:
    with pytest.raises(InputError) as caught:
        GRID_TIME.seconds(step)
    assert message in str(caught.value)


def test_a_grid_holds_for_its_own_deployment() -> None:
    GridStepTime(GRID, Shard(replace(SHAPE, name="a copy"), H200, 1))
    for message, model, gpu, ranks, kv in (
        ("another GPU: H200, not L4", SHAPE, find_gpu("l4"), 1, 2),
        ("another model: 28 layers of 3584, 2 bytes", load("Qwen3-4B"), H200, 1, 2),
        ("another tensor_parallel_size: 1, not 2", SHAPE, H200, 2, 2),
        ("another KV bytes: 2, not 1", SHAPE, H200, 1, 1),
    ):
        with pytest.raises(InputError, match=message):
            GridStepTime(GRID, Shard(model, gpu, ranks, kv_dtype_bytes=kv))


def test_parts_add_up_and_idle_steps_take_no_time() -> None:
    step = Step(chunks=((64, 0),), decodes=4, decode_context=1200, samples=5)
    assert sum(GRID_TIME.breakdown(step).values()) == pytest.approx(GRID_TIME.seconds(step))
    assert GRID_TIME.binding(step) == PhysicalStepTime(Shard(SHAPE, H200, 1, cudagraph_sizes=SIZES)).binding(
        step
    )
    assert GRID_TIME.seconds(Step()) == 0.0
    assert GRID_TIME.breakdown(Step()) == {}


def test_a_surface_of_single_points() -> None:
    surface = Surface(("batch", "context"), [(1, 10.0, 1.0), (3, 20.0, 3.0)], ())
    assert surface.seconds(2, 15.0) == pytest.approx(2.0)
    with pytest.raises(InputError, match="context 21 at batch 2; measured were 10 to 20"):
        surface.seconds(2, 21.0)


# from measurements


def test_a_grid_of_a_measured_engine_predicts_all_regions(tmp_path: Path) -> None:
    truth = Efficiencies(compute=0.5, bandwidth=0.7, host_fixed_s=1e-3)
    law = physical_law(MODEL, truth)
    found = fit_folder(write_folder(tmp_path, {MODEL: law}), kind="grid")
    assert found.good
    for region in found.summary.regions:
        assert region.error < 0.05
        assert region.held_out is not None
        assert region.held_out < 0.05
    profile = found.profile
    path = tmp_path / "grid.json"
    profile.save(path)
    assert Profile.load(path) == profile
    assert transfer(profile, Shard(SHAPE, H200, 1)).basis == "measured here"
    grid = build_step_time(profile, Shard(SHAPE, H200, 1))
    errors = [
        abs(grid.seconds(step) / law(step) - 1) for step in steps_of_grid() if step.region == "decode_ragged"
    ]
    assert max(errors) < 0.05
    assert profile.grid is not None
    assert profile.grid.cudagraph_sizes == CAPTURED


def test_a_staircase_is_kept(tmp_path: Path) -> None:
    """Between captured sizes the step does not rise, though only some sizes were measured."""

    def law(step: Step) -> float:
        tokens = step.decodes + sum(tokens for tokens, _ in step.chunks)
        return 0.02 + 2e-4 * next((size for size in CAPTURED if size >= tokens), tokens)

    grid = build_step_time(
        fit_folder(write_folder(tmp_path, {MODEL: law}, cv=0.001), kind="grid").profile, Shard(SHAPE, H200, 1)
    )
    for n in range(1, 257):
        assert grid.seconds(decode(n, 1025)) == pytest.approx(law(decode(n, 1025)), rel=0.02)


def test_laws_that_do_not_compose_are_refused(tmp_path: Path) -> None:
    """Decodes get cheaper the more there are: no step with chunks can be told from the nodes."""
    found = fit_folder(write_folder(tmp_path, {MODEL: lambda step: 0.08 - 2.5e-4 * step.batch}), kind="grid")
    assert not found.good
    assert any(reason.startswith("mixed") for reason in found.summary.reasons)


@pytest.mark.parametrize(
    ("models", "regions", "message"),
    [
        ((MODEL, "Qwen3-4B"), None, "a grid holds for one engine, and 2 were measured"),
        ((MODEL,), ("decode",), "a grid needs decode steps and prompts without context; there are 41 and 0"),
        ((MODEL,), ("prefill", "mixed"), "there are 0 and"),
    ],
)
def test_what_a_grid_cannot_be_made_of(
    tmp_path: Path, models: tuple[str, ...], regions: tuple[str, ...] | None, message: str
) -> None:
    chosen = [step for step in steps_of_grid() if regions is None or step.region in regions]
    folder = write_folder(
        tmp_path, {name: physical_law(name, Efficiencies()) for name in models}, steps=chosen
    )
    with pytest.raises(InputError) as caught:
        fit_folder(folder, kind="grid")
    assert message in str(caught.value)


def test_a_grid_profile_without_its_grid_is_named(tmp_path: Path) -> None:
    profile = Profile.typical("H200", MODEL, "0.32", servecast_version="0").model_copy(
        update={"kind": "grid"}
    )
    with pytest.raises(InputError, match="kind is grid, but there is no grid"):
        build_step_time(profile, Shard(SHAPE, H200, 1))
    data = json.loads(profile.model_copy(update={"grid": GRID}).model_dump_json())
    data["grid"]["decode"] = []
    path = tmp_path / "empty.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"grid\.decode"):
        Profile.load(path)


# physics


@dataclass(frozen=True)
class Case:
    profile: Profile
    model: str
    gpu: str


seconds = st.floats(1e-6, 1.0)


@st.composite
def grids(draw: st.DrawFn) -> Case:
    """Any times, however fast, at any nodes."""
    model, gpu = draw(st.sampled_from(DEPLOYMENTS))
    sizes, contexts = st.integers(1, 512), st.floats(1, 50_000)
    decode_nodes = draw(st.lists(st.tuples(sizes, contexts, seconds), min_size=1, max_size=12))
    prefill_nodes = draw(
        st.lists(st.tuples(st.integers(1, 8192), st.just(0.0) | contexts, seconds), min_size=1, max_size=12)
    )
    grid = Grid(
        gpu=gpu.name,
        shape=SHAPES[model],
        cudagraph_sizes=draw(st.sampled_from(((), CAPTURED))),
        decode=tuple(decode_nodes),
        prefill=tuple(prefill_nodes),
        mixed_factor=draw(st.floats(0.1, 3.0)),
    )
    profile = Profile.typical(gpu.name, model, "0.32", servecast_version="0")
    return Case(profile.model_copy(update={"kind": "grid", "grid": grid}), model, gpu.name)


@st.composite
def physicals(draw: st.DrawFn) -> Case:
    model, gpu = draw(st.sampled_from(DEPLOYMENTS))
    profile = Profile.typical("H200", MODEL, "0.32", servecast_version="0")
    return Case(profile.model_copy(update={"efficiencies": draw(efficiencies)}), model, gpu.name)


@settings(max_examples=400, deadline=None)
@given(grids() | physicals(), steps())
def test_no_profile_ever_predicts_a_step_under_its_roofline(case: Case, step: Step) -> None:
    model, gpu = SHAPES[case.model], find_gpu(case.gpu)
    step_time = build_step_time(case.profile, Shard(model, gpu, 1, cudagraph_sizes=CAPTURED))
    roofline = PhysicalStepTime(Shard(model, gpu, 1)).roofline_seconds(step)
    assert step_time.roofline_seconds(step) == pytest.approx(roofline, rel=1e-12)
    try:
        predicted = step_time.seconds(step)
    except InputError:
        assert case.profile.kind == "grid"
        return
    assert predicted >= roofline * (1 - 1e-12)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> list[Profile]:
    """Fitted profiles, of a machine that is faster than its datasheet lets it be among them."""
    folder = tmp_path_factory.mktemp("physics")
    law = physical_law(MODEL, Efficiencies(1, 1, 1, 1, 8.0, 0, 0, 0, 0))
    found = []
    for name, scale in (("as stated", 1.0), ("too fast", 0.5)):
        write_folder(folder / name, {MODEL: lambda step, scale=scale: scale * law(step)}, cv=0.1)
        found += [fit_folder(folder / name, kind=kind).profile for kind in ("physical", "grid")]
    assert read_folder(folder / "too fast").engines[0].model.layers == SHAPE.layers
    return found


@settings(max_examples=200, deadline=None)
@given(steps())
def test_no_fitted_profile_does_either(fitted: list[Profile], step: Step) -> None:
    for profile in fitted:
        step_time = build_step_time(profile, Shard(SHAPE, H200, 1, cudagraph_sizes=CAPTURED))
        try:
            predicted = step_time.seconds(step)
        except InputError:
            assert profile.kind == "grid"
            continue
        assert predicted >= step_time.roofline_seconds(step) * (1 - 1e-12)
