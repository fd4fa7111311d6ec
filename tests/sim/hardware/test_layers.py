"""Steps put together from layer timing tables: composed, bounded, read, and fitted."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from model_shapes import load as model_of
from small_scenarios import open_loop, small

from servecast.calibrate.cli import app
from servecast.calibrate.fit import layers
from servecast.calibrate.fit.layer_tables import read_layer_tables
from servecast.calibrate.fit.layers import designed_steps, fit_layers
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.profile import Profile, build_step_time
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.layers import LayeredStepTime, LayerTables
from servecast.sim.hardware.step_time.physical import Efficiencies, PhysicalStepTime
from servecast.sim.inputs.errors import InputError
from servecast.sim.run.simulate import simulate
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario

MODEL = model_of("Llama-3.1-8B-Instruct")
GPU = find_gpu("RTX 4090")
SHARD = Shard(MODEL, GPU, 1)
NO_HOST = Efficiencies(host_fixed_s=0.0, host_per_seq_s=0.0)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
SEQUENCES = (1, 16, 64, 256)
CHUNK, CONTEXT = (0, 16, 128, 1024, 2048), (0, 16, 512, 4096, 16384)
DECODES, DECODE_CONTEXT = (0, 1, 8, 64, 256), (0, 16, 512, 4096, 16384)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the steps tells these laws, too."""
    monkeypatch.setattr(layers, "_STEPS", 300)


@dataclass(frozen=True)
class Step:
    chunks: tuple[tuple[int, int], ...] = ()
    decodes: int = 0
    decode_context: int = 0
    samples: int = 0


def points() -> Iterable[tuple[int, int, int, int]]:
    """Of attention: some chunk or some decodes; contexts only where there is something with a context."""
    for chunk, context, decodes, decode_context in itertools.product(CHUNK, CONTEXT, DECODES, DECODE_CONTEXT):
        something = chunk or decodes
        too_many = chunk and decodes == DECODES[-1]
        if something and not too_many and (chunk or not context) and bool(decodes) == bool(decode_context):
            yield chunk, context, decodes, decode_context


def attention_us(chunk: float, context: float, decodes: float, decode_context: float) -> float:
    return 5 + 1e-4 * chunk * (context + chunk / 2) + 0.005 * decodes * decode_context


def tables(scale: float = 1.0) -> LayerTables:
    """Linear in all that is interpolated linearly."""
    grid = {point: scale * 1e-6 * attention_us(*point) for point in points()}
    axes = itertools.product(CHUNK, CONTEXT, DECODES, DECODE_CONTEXT)
    return LayerTables(
        gpu=GPU.name,
        shape=MODEL,
        tokens=TOKENS,
        linear=tuple(scale * 1e-6 * (500 + 3 * n) for n in TOKENS),
        elementwise=tuple(scale * 1e-6 * (10 + 0.1 * n) for n in TOKENS),
        once=tuple(scale * 5e-6 for _ in TOKENS),
        sequences=SEQUENCES,
        lm_head=tuple(scale * 1e-6 * (1100 + 2 * n) for n in SEQUENCES),
        sampler=tuple(scale * 1e-6 * (25 + n) for n in SEQUENCES),
        chunk=CHUNK,
        context=CONTEXT,
        decodes=DECODES,
        decode_context=DECODE_CONTEXT,
        attention=tuple(grid.get(point) for point in axes),
    )


TABLES = tables()


def layered(efficiencies: Efficiencies = NO_HOST, **options: Any) -> LayeredStepTime:
    return LayeredStepTime(TABLES, replace(SHARD, **options), efficiencies)


# ---- composed ----------------------------------------------------------------------------------------


def test_decodes_between_the_points() -> None:
    """50 decodes of 700 tokens: by hand, with 32 layers."""
    expected = 32e-6 * (500 + 150 + 10 + 5 + 5 + 0.005 * 50 * 700) + 5e-6 + 1e-6 * (1200 + 75)
    assert layered().seconds(Step((), 50, 35_000, 50)) == pytest.approx(expected)


def test_a_chunk_beside_decodes() -> None:
    """1,024 prompt tokens after 512, beside 8 decodes of 4,096."""
    attention = attention_us(1024, 512, 8, 4096)
    expected = 32e-6 * (500 + 3 * 1032 + 10 + 103.2 + attention) + 5e-6 + 1e-6 * (1118 + 34)
    assert layered().seconds(Step(((1024, 512),), 8, 32_768, 9)) == pytest.approx(expected)


def test_what_samples_nothing_has_no_lm_head() -> None:
    assert not {"lm_head", "sampler"} & set(layered().breakdown(Step(((512, 0),), 0, 0, 0)))


def test_several_chunks_are_one_of_their_tokens_and_pairs() -> None:
    """100 after 1,000 and 924 after 300: 1,024 tokens whose pairs are those of a context of 187.5."""
    both = layered().breakdown(Step(((100, 1000), (924, 300)), 0, 0, 2))
    pairs = 100 * 1050 + 924 * (300 + 462)
    assert both["attention"] == pytest.approx(32e-6 * (5 + 1e-4 * pairs))


def test_short_chunks_together_are_less_than_one_long_one() -> None:
    """Four of 512 have a quarter of the pairs of one of 2,048: those of one of 1,024."""
    four, half = (layered().breakdown(Step(c, 0, 0, 1)) for c in (((512, 0),) * 4, ((1024, 0),)))
    assert four["attention"] == pytest.approx(half["attention"])


def test_tokens_are_padded_to_cuda_graph_sizes() -> None:
    padded = layered(cudagraph_sizes=(1, 2, 4, 8, 16, 24, 32, 40))
    step = Step((), 33, 33 * 500, 33)
    assert padded.breakdown(step)["linear"] == pytest.approx(32e-6 * (500 + 3 * 40))
    assert padded.breakdown(step)["attention"] == layered().breakdown(step)["attention"]


def test_the_host_comes_on_top() -> None:
    host = replace(NO_HOST, host_fixed_s=1e-3, host_per_seq_s=1e-5)
    step = Step(((512, 0),), 10, 5000, 11)
    assert layered(host).seconds(step) == pytest.approx(layered().seconds(step) + 1e-3 + 11e-5)


def test_an_empty_step_takes_no_time() -> None:
    assert layered().seconds(Step()) == 0.0


# ---- bounded -----------------------------------------------------------------------------------------


@given(
    st.floats(0.0, 3.0),
    st.lists(st.tuples(st.integers(1, 496), st.integers(0, 8000)), max_size=4),  # 2,048 tokens with decodes
    st.integers(0, 64),
    st.integers(1, 16_000),
)
def test_never_under_the_roofline(
    scale: float, chunks: list[tuple[int, int]], decodes: int, context: int
) -> None:
    """Even where the tables say that kernels are faster than the GPU can be."""
    model = LayeredStepTime(tables(scale), SHARD, NO_HOST)
    step = Step(tuple(chunks), decodes, decodes * context, decodes + len(chunks))
    if chunks or decodes:
        assert model.seconds(step) >= model.roofline_seconds(step)
        assert model.seconds(step) == sum(model.breakdown(step).values())


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step(((2000, 0),), 64, 64_000, 65), "2064 tokens a step, measured from 1 to 2048"),
        (Step((), 300, 30_000, 300), "300 decodes a step, measured from 0 to 256"),
        (Step((), 1, 20_000, 1), "20000 KV tokens a decode, measured from 0 to 16384"),
        (Step(((100, 17_000),), 0, 0, 1), "17000 KV tokens before a chunk, measured from 0 to 16384"),
    ],
)
def test_beyond_the_tables_is_refused(step: Step, message: str) -> None:
    with pytest.raises(InputError, match=rf"profile: layers: a step beyond the layer tables: {message}"):
        layered().seconds(step)


# ---- put together --------------------------------------------------------------------------------------


def test_prompts_and_decodes_that_were_not_timed_together_add_up() -> None:
    """100 decodes at 1,000 tokens beside 100 prompt tokens are not in the tables; both alone are."""
    together = layered().breakdown(Step(((100, 0),), 100, 100_000, 101))["attention"]
    alone = [Step((), 100, 100_000, 100), Step(((100, 0),), 0, 0, 1)]
    assert together == pytest.approx(sum(layered().breakdown(each)["attention"] for each in alone), rel=0.02)
    with pytest.raises(InputError, match=r"100 prompt tokens a step, .* were not measured"):
        LayeredStepTime(TABLES, SHARD, NO_HOST, measured_only=True).seconds(
            Step(((100, 0),), 100, 100_000, 101)
        )


def test_a_grid_over_keys_has_a_time_for_every_prompt_in_it() -> None:
    """Keys count the chunk too: 16 tokens behind 48 are 64 keys. No chunk has fewer keys than tokens."""
    chunks, keys = (0, 16, 64), (0, 16, 64, 256)

    def us(chunk: int, key: int) -> float:
        return chunk * (key - chunk / 2)

    made = TABLES.model_copy(
        update={
            "chunk": chunks,
            "context": keys,
            "decodes": (0, 1),
            "decode_context": (0, 16),
            "keys": True,
            "attention": tuple(
                (1e-6 * us(c, k) if c and not (n or d) else 2e-6 if n and d and not (c or k) else None)
                if c == 0 or k >= c
                else None
                for c, k, n, d in itertools.product(chunks, keys, (0, 1), (0, 16))
            ),
        }
    )
    model = LayeredStepTime(made, SHARD, NO_HOST)
    for chunk, context in ((16, 0), (16, 48), (64, 0), (64, 192), (40, 24)):
        found = model.breakdown(Step(((chunk, context),), 0, 0, 1))["attention"] / MODEL.layers
        if (chunk, chunk + context) in itertools.product(chunks, keys):
            assert found == pytest.approx(1e-6 * us(chunk, chunk + context))
        assert 0 < found < 1e-6 * us(64, 256) + 1e-12
    both = model.breakdown(Step(((16, 0),), 1, 16, 2))["attention"] / MODEL.layers
    assert both == pytest.approx(1e-6 * us(16, 16) + 2e-6)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (
            lambda: LayeredStepTime(TABLES, Shard(replace(MODEL, hidden_size=2048), GPU, 1), NO_HOST),
            "model sizes",
        ),
        (lambda: LayeredStepTime(TABLES, Shard(MODEL, find_gpu("l4"), 1), NO_HOST), "GPU: RTX 4090, not L4"),
        (lambda: layered(tensor_parallel_size=2), "tensor_parallel_size: 1, not 2"),
        (lambda: layered(kv_dtype_bytes=1), "KV bytes: 2, not 1"),
    ],
)
def test_another_deployment_is_refused(make: Callable[[], object], what: str) -> None:
    with pytest.raises(InputError, match=f"measured with another {what}"):
        make()


def test_another_number_of_layers_is_not() -> None:
    step = Step((), 8, 4000, 8)
    half = LayeredStepTime(TABLES, Shard(replace(MODEL, layers=16), GPU, 1), NO_HOST).breakdown(step)
    assert half["linear"] == pytest.approx(layered().breakdown(step)["linear"] / 2)


# ---- read --------------------------------------------------------------------------------------------


def write(folder: Path, seconds: Callable[[str, int], float], attention: Callable[..., float]) -> Path:
    """A folder of tables. seconds: of a kernel at so many tokens or sequences."""
    folder.mkdir(exist_ok=True)
    meta = {
        "gpu": "NVIDIA GeForce RTX 4090",
        "model": "made/up",
        "vllm_version": "0.19.0",
        "tp_degrees": [1],
        "engine_effective": {"hf_overrides": {"num_hidden_layers": 1, "vocab_size": 128256}},
    }
    (folder / "meta.yaml").write_text(yaml.safe_dump(meta))
    kernels = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "layernorm", "rotary_emb", "act_fn")
    save(
        folder / "dense.csv",
        ("layer", "tokens", "time_us"),
        [(k, n, 1e6 * seconds(k, n)) for k in (*kernels, "embedding", "final_layernorm") for n in TOKENS],
    )
    save(
        folder / "per_sequence.csv",
        ("layer", "sequences", "time_us"),
        [(k, n, 1e6 * seconds(k, n)) for k in ("lm_head", "sampler") for n in SEQUENCES],
    )
    save(
        folder / "attention.csv",
        ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),
        [(*point, 1e6 * attention(*point)) for point in points()],
    )
    return folder


def save(path: Path, header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def plain(folder: Path) -> Path:
    return write(folder, lambda _kernel, n: 1e-6 * n, lambda *point: 1e-6 * attention_us(*point))


def test_a_folder_is_read(tmp_path: Path) -> None:
    found = read_layer_tables(plain(tmp_path), MODEL)
    assert (found.model, found.engine_version, found.tables.gpu) == ("made/up", "0.19.0", "RTX 4090")
    assert found.tables.linear == pytest.approx([4e-6 * n for n in TOKENS])
    assert found.tables.elementwise == pytest.approx([4e-6 * n for n in TOKENS])  # two norms
    assert found.tables.once == pytest.approx([2e-6 * n for n in TOKENS])
    expected = [None if each is None else pytest.approx(each) for each in TABLES.attention]
    assert list(found.tables.attention) == expected


def drop(name: str, text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(line for line in lines if not line.startswith(text)))

    return change


def add(name: str, line: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write(line + "\n")

    return change


def meta(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = yaml.safe_load((folder / "meta.yaml").read_text())
        (folder / "meta.yaml").write_text(yaml.safe_dump({**data, **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "per_sequence.csv").unlink(), "there is no per_sequence.csv"),
        (drop("dense.csv", "layer"), "dense.csv: there is no column 'layer'"),
        (drop("dense.csv", "o_proj,64,"), "o_proj was not measured at 64 tokens"),
        (drop("per_sequence.csv", "lm_head,1,"), "lm_head was not measured at 1 sequences"),
        (add("dense.csv", "moe,1,5"), "dense.csv, line 110: unknown kernel 'moe'"),
        (add("dense.csv", "act_fn,1,5"), "act_fn at 1 tokens again"),
        (add("dense.csv", "act_fn,5,-2"), "time_us is '-2', not a number of 0 or more"),
        (add("dense.csv", "act_fn,3000,"), "time_us is '', not a number of 0 or more"),
        (add("dense.csv", "act_fn,2.5,3"), "tokens is '2.5', not a whole number"),
        (add("attention.csv", "0,0,2,16"), "time_us is None, not a number"),
        (add("attention.csv", "0,0,1,16,9"), "a point for the second time"),
        (meta(gpu=None), "meta.yaml: gpu is missing"),
        (meta(gpu="GTX 8800"), "meta.yaml: gpu: GPU 'GTX 8800' is not in the catalogue"),
        (meta(tp_degrees=[1, 2]), r"tp_degrees: tables of tensor parallel degrees \[1, 2\]"),
        (
            meta(engine_effective={"hf_overrides": {"intermediate_size": 11008}}),
            "intermediate_size is 11008, that of .* is 14336",
        ),
    ],
)
def test_a_folder_that_is_wrong_is_refused(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    change(plain(tmp_path))
    with pytest.raises(InputError, match=message):
        read_layer_tables(tmp_path, MODEL)


EXPERTS = model_of("Qwen3-30B-A3B")  # 48 layers, all of 128 experts of which a token uses 8; QK-norm


def mixture(folder: Path, *ranks: int) -> Path:
    """Tables of a mixture of experts, one folder a degree, as newer profilers write them. Each kernel takes
    n us at n tokens over the ranks; experts 10 us for each that is touched."""
    folder.mkdir(exist_ok=True)
    for degree in ranks:
        inside = write(folder / f"tp{degree}", lambda _kernel, n, d=degree: 1e-6 * n / d, lambda *_: 1e-5)
        kernels = ("qkv_proj", "o_proj", "layernorm", "rotary_emb", "qk_norm", "embedding", "final_layernorm")
        rows = [(k, n, n / degree) for k in kernels for n in TOKENS]
        save(inside / "dense.csv", ("layer", "tokens", "time_us"), rows)
        touched = [(1, n, e, 10 * e / degree) for n in TOKENS for e in (8, 16, 64, 128) if e <= 8 * n]
        header = ("ep", "tokens", "activated_experts", "time_us")
        save(inside / "moe.csv", header, [*touched, (2, 1, 4, 1.0)])
        (inside / "meta.yaml").rename(folder / "meta.yaml")
    sizes = {"num_attention_heads": 32 // max(ranks), "intermediate_size": EXPERTS.intermediate_size}
    meta(tp_degrees=list(ranks), gpu="My GPU", engine_effective={"hf_overrides": sizes})(folder)
    return folder


def test_experts_qk_norm_ranks_and_a_gpu_of_ones_own(tmp_path: Path) -> None:
    own = replace(find_gpu("rtx pro 6000"), name="mine")
    mixture(tmp_path / "tables", 1, 2)
    for ranks in (1, 2):
        found = read_layer_tables(tmp_path / "tables", EXPERTS, own, tensor_parallel_size=ranks).tables
        assert (found.gpu, found.tensor_parallel_size) == ("mine", ranks)
        assert found.linear == pytest.approx([2e-6 * n / ranks for n in TOKENS])  # no MLP in any layer
        assert found.elementwise == pytest.approx([4e-6 * n / ranks for n in TOKENS])  # two norms, QK-norm
        model = LayeredStepTime(found, Shard(EXPERTS, own, ranks), NO_HOST)
        parts = model.breakdown(Step((), 4, 4 * 16, 4))
        touched = 128 * (1 - (1 - 8 / 128) ** 4)  # 29.1 of four tokens
        assert parts["experts"] == pytest.approx(48 * 10e-6 * touched / ranks)
        assert ("all_reduce" in parts) == (ranks > 1)
        assert model.breakdown(Step((), 1, 16, 1))["experts"] == pytest.approx(48 * 80e-6 / ranks)
    with pytest.raises(InputError, match="GPU 'My GPU' is not in the catalogue"):
        read_layer_tables(tmp_path / "tables", EXPERTS)
    with pytest.raises(InputError, match=r"tensor parallel degrees \[1, 2\], the scenario's is 4"):
        read_layer_tables(tmp_path / "tables", EXPERTS, own, tensor_parallel_size=4)
    (tmp_path / "tables" / "tp1" / "moe.csv").unlink()
    with pytest.raises(InputError, match=r"tp1: there is no moe.csv"):
        read_layer_tables(tmp_path / "tables", EXPERTS, own)


def test_a_profile_of_such_tables_runs_from_its_first_step(tmp_path: Path) -> None:
    mixture(tmp_path / "tables", 1, 2)
    replace(find_gpu("rtx pro 6000"), name="mine").save(tmp_path / "gpu.json")
    engine = {
        "version": "0.32",
        "tensor_parallel_size": 2,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 1024,
    }
    made = small(
        tmp_path,
        name="mixture",
        model={"config": "Qwen3-30B-A3B"},
        gpu={"file": "gpu.json"},
        engine=engine,
        workload=open_loop(5, 40, 300, 20),
    )
    profile = fit_layers(tmp_path / "tables", made, kind="layers")
    assert (profile.gpu, profile.tensor_parallel_size) == ("mine", 2)
    run = simulate(Deployment.of(made, profile))
    assert (run.requests["status"] == "finished").all()


# ---- fitted ------------------------------------------------------------------------------------------


def scenario(folder: Path) -> Scenario:
    return small(
        folder,
        name="tables",
        model={"config": "Llama-3.1-8B-Instruct"},
        gpu={"name": "rtx 4090"},
        engine={"version": "0.19", "num_gpu_blocks_override": 2588, "max_model_len": 8192},
    )


LAW = replace(
    NO_HOST,
    compute=0.62,
    bandwidth=0.81,
    attention_compute=0.5,
    kv_bandwidth=0.7,
    overlap_exponent=3.0,
    kernel_s=3e-6,
)


def tables_of_a_law(folder: Path) -> Path:
    """What a GPU with these efficiencies would have measured, kernel by kernel."""
    physical = PhysicalStepTime(SHARD, LAW)

    def part(name: str, step: Step) -> float:
        return physical.breakdown(step)[name]

    def seconds(kernel: str, n: int) -> float:
        if kernel in ("lm_head", "sampler"):
            return part(kernel, Step((), n, 16 * n, n))
        step = Step(((n, 0),), 0, 0, 0)
        if kernel == "gate_up_proj":
            return part("linear", step) / MODEL.layers
        if kernel == "act_fn":
            return (part("elementwise", step) + part("kernels", step)) / MODEL.layers
        return 0.0

    def attention(chunk: int, context: int, decodes: int, decode_context: int) -> float:
        step = Step(((chunk, context),) if chunk else (), decodes, decodes * decode_context)
        return (part("attention_prefill", step) + part("attention_decode", step)) / MODEL.layers

    return write(folder, seconds, attention)


def test_a_law_is_recovered(tmp_path: Path) -> None:
    fitted = fit_layers(tables_of_a_law(tmp_path / "tables"), scenario(tmp_path))
    assert fitted.fit is not None
    assert fitted.fit.reasons == ()
    assert max(region.error for region in fitted.fit.regions) < 0.03
    found = fitted.efficiencies
    for name in ("compute", "bandwidth", "kv_bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(LAW, name), rel=0.05), name
    assert (found.host_fixed_s, found.host_per_seq_s) == (
        Efficiencies().host_fixed_s,
        Efficiencies().host_per_seq_s,
    )
    assumed = {entry.parameter for entry in fitted.provenance if entry.origin == "assumed"}
    assert "efficiencies.host_fixed_s" in assumed


def test_a_law_that_the_model_cannot_express_is_a_bad_fit(tmp_path: Path) -> None:
    """Matrix products that take ever more time a token."""
    folder = write(
        tmp_path / "tables",
        lambda kernel, n: 1e-3 + 2e-7 * n**2 if kernel == "gate_up_proj" else 1e-6,
        lambda *_point: 1e-5,
    )
    fit = fit_layers(folder, scenario(tmp_path)).fit
    assert fit is not None
    assert any(reason.startswith("prefill") for reason in fit.reasons)


def test_a_profile_of_tables_is_written_and_read(tmp_path: Path) -> None:
    fitted = fit_layers(tables_of_a_law(tmp_path / "tables"), scenario(tmp_path), kind="layers")
    fitted.save(tmp_path / "profile.json")
    loaded = Profile.load(tmp_path / "profile.json")
    assert loaded == fitted
    model = build_step_time(loaded, SHARD)
    assert isinstance(model, LayeredStepTime)
    step = Step(((512, 0),), 8, 4096, 9)
    law = PhysicalStepTime(SHARD, replace(LAW, host_fixed_s=0.3e-3, host_per_seq_s=5e-6))
    assert model.seconds(step) == pytest.approx(law.seconds(step), rel=0.02)


def test_a_profile_without_its_tables_is_refused(tmp_path: Path) -> None:
    profile = Profile(servecast_version="1", kind="layers", gpu=GPU.name, model="m", engine_version="0.19")
    with pytest.raises(InputError, match="kind is layers, but there are none"):
        build_step_time(profile, SHARD)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens", [1, 4, 2], "tokens does not rise"),
        ("sampler", [1.0], "sampler has 1 times for 4 points"),
        ("once", [-1.0] * len(TOKENS), "once has a negative time"),
    ],
)
def test_tables_that_cannot_be_are_refused(field: str, value: list[float], message: str) -> None:
    profile = Profile(
        servecast_version="1", kind="layers", gpu=GPU.name, model="m", engine_version="0.19", layers=TABLES
    )
    data = json.loads(profile.model_dump_json())
    data["layers"][field] = value
    with pytest.raises(InputError, match=message):
        Profile.parse(data, "p.json")


def run(*words: str) -> int:
    """The exit code of ``servecast calibrate``."""
    result = app(list(words), result_action="return_value", exit_on_error=False)
    return int(result or 0)


@pytest.mark.parametrize("kind", ["physical", "layers"])
def test_calibrate_fit_takes_a_folder_of_tables(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named, output = scenario(tmp_path).source, tmp_path / "out.json"
    folder = str(tables_of_a_law(tmp_path / "tables"))
    code = run("fit", folder, "--kind", kind, "--scenario", named, "--output", str(output), "--json")
    assert (code, json.loads(capsys.readouterr().out)["good"]) == (0, True)
    assert Profile.load(output).kind == kind


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--scenario: nothing says which model and GPU"),
        (["--scenario", "l4-qwen2.5-0.5b", "--kind", "grid"], "--kind: layer timing tables hold no steps"),
        (["--scenario", "l4-qwen2.5-0.5b"], "vocab_size is 128256, that of"),
    ],
)
def test_calibrate_fit_says_what_it_needs(words: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    with pytest.raises(InputError, match=message):
        run("fit", str(plain(tmp_path / "tables")), "--output", str(output), *words)
    assert not output.exists()


def test_designed_steps_fit_the_pool() -> None:
    steps = designed_steps(layered(), 41_000, 300)
    held = [step.decode_context + sum(map(sum, step.chunks)) for step in steps]
    assert 30_000 < max(held) <= 41_000
    assert Counter(step.region for step in steps) == {"decode": 100, "prefill": 100, "mixed": 100}


def test_a_pool_without_room_for_a_measured_step_is_refused() -> None:
    with pytest.raises(InputError, match="hardly a mixed step that was measured fits the 20 KV tokens"):
        designed_steps(layered(), 20, 30)
