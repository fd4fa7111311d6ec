"""What people paste as a server's command: every shape gives the flags that vLLM's own parser takes of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic_core import PydanticCustomError
from small_scenarios import TINY, small

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.pasted_command import find_serve
from servecast.sim.scenario.vllm_flags import parse_serve_command
from servecast.sim.scenario.vllm_server import Vllm

TAKEN = {"tensor_parallel_size": 2, "max_model_len": 16384}
FLAGS = "--tensor-parallel-size 2 --max-model-len 16384"
MODULE = "vllm.entrypoints.openai.api_server"


def deployed(folder: Path, **engine: Any) -> Deployment:
    return Deployment.of(small(folder, engine={**TINY["engine"], **engine}))


@pytest.mark.parametrize(
    "text",
    [
        f"vllm serve Q/m {FLAGS}",
        f"vllm serve Q/m {FLAGS} &",
        f"vllm serve Q/m {FLAGS} > server.log 2>&1 &",
        f"nohup vllm serve Q/m {FLAGS} >>log & sleep 60; curl localhost:8000/health",
        f"pip install vllm && vllm serve Q/m {FLAGS} | tee log",
        "vllm serve Q/m --tensor-parallel-size 2 \\\n  --max-model-len 16384   # as in guides, don't ask",
        "# it\nexport A=a\nvllm serve Q/m \\  \n  --tensor-parallel-size 2 \\\r\n  --max-model-len 16384",
        "vllm serve Q/m\n  --tensor-parallel-size 2\n  --max-model-len 16384\n",
        f"CUDA_VISIBLE_DEVICES=0,1 HF_HOME='/a b' /opt/venv/bin/vllm serve Q/m {FLAGS}",
        f"sudo env A=1 numactl -N 0 vllm serve --model Q/m {FLAGS}",
        f"uv run --with vllm vllm serve Q/m {FLAGS}",
        f"python3 -m {MODULE} --model Q/m {FLAGS}",
        f"python -m vllm.entrypoints.cli.main serve Q/m {FLAGS}",
        f"bash -c 'vllm serve Q/m {FLAGS}'",
        f"docker run --gpus all --name vllm -v ~/vllm:/r --ipc=host vllm/vllm-openai --model Q/m {FLAGS}",
        f"docker run -d --rm --runtime nvidia ghcr.io/me/llm:latest vllm serve Q/m {FLAGS}",
        f"docker run --entrypoint python3 vllm/vllm-openai -m {MODULE} --model Q/m {FLAGS}",
        f"sudo podman run -it --entrypoint bash vllm/vllm-openai:v0.32.0 -c 'vllm serve Q/m {FLAGS}'",
        ["--model", "Q/m", "--tensor-parallel-size", "2", "--max-model-len=16384"],
        ["serve", "Q/m", "--tensor-parallel-size=2", "--max-model-len", 16384],
        ["vllm", "serve", "Q/m", *FLAGS.split()],
        ["/bin/sh", "-c", f"exec vllm serve Q/m {FLAGS}"],
        {"command": ["vllm", "serve"], "args": ["Q/m", *FLAGS.split()]},
        {"command": ["python3", "-m", MODULE], "args": ["--model=Q/m", *FLAGS.split()]},
        '["--model", "Q/m", "--tensor-parallel-size", "2", "--max-model-len", "16384"]',
        "- serve\n- Q/m\n- --tensor-parallel-size=2\n- --max-model-len=16384\n",
        "args:\n  - --model\n  - Q/m\n  - --tensor-parallel-size=2\n  - --max-model-len=16384\n",
    ],
    ids=str,
)  # fmt: skip
def test_every_shape_is_the_same_command(text: Any) -> None:
    command = parse_serve_command(text, version="0.32")
    assert (command.model, command.flags, command.ignored) == ("Q/m", TAKEN, ())
    engine = parse(EngineFlags, {"version": "0.32", "command": text}, source="test")
    assert (engine.tensor_parallel_size, engine.max_model_len) == (2, 16384)


def test_a_plain_yaml_scalar_folds_its_continued_lines() -> None:
    text = "command: vllm serve Q/m \\\n    --tensor-parallel-size 2 \\\n    --max-model-len 16384\n"
    assert parse_serve_command(yaml.safe_load(text)["command"]).flags == TAKEN


@pytest.mark.parametrize(
    "text", ["python server.py", "curl localhost", "docker run -it", "docker ps", "", "# vllm serve m"]
)
def test_another_command_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a vllm serve command"):
        find_serve(text)


@pytest.mark.parametrize(
    ("words", "version", "flags"),
    [  # each as the parser of that release takes it
        ("--max-num-seq 5", "0.10", {"max_num_seqs": 5}),
        ("--tensor-par 2", "0.33", {"tensor_parallel_size": 2}),
        ("--no-enable-prefix", "0.23", {"enable_prefix_caching": False}),
        ("--disable-prefix-caching", "0.33", {"enable_prefix_caching": False}),
        ("--hf-overrides.a.b 5 --hf-overrides.c x", "0.23", {"hf_overrides": {"a": {"b": 5}, "c": "x"}}),
        ("-tp=4", "0.10", {"tensor_parallel_size": 4}),
        ("--max_model_len 1k", "0.10", {"max_model_len": 1000}),
        ("--prefill-schedule-interval 4", "0.33", {"prefill_schedule_interval": 4}),
    ],
)  # fmt: skip
def test_flags_cut_short_and_dotted(words: str, version: str, flags: dict[str, Any]) -> None:
    assert parse_serve_command(f"vllm serve m {words}", version=version).flags == flags


@pytest.mark.parametrize(
    ("words", "version", "message"),
    [
        ("--max-num 5", "0.23", "--max-num can mean --max-num-batched-tokens, --max-num-partial-prefills"),
        ("--disable-prefix-caching", "0.23", "vllm serve has no flag --disable-prefix-caching"),
        ("--disable-log-requests", "0.32", "has no --disable-log-requests. Remove it, or use version 0.10"),
        ("--rope-scaling {}", "0.23", "vLLM 0.23 has no --rope-scaling"),
        ("--watermark 0.1", "0.23.0", "has no --watermark. Remove it, or use version 0.24 to 0.33"),
        ("--max-num-seqs.a 5", "0.32", "--max-num-seqs.a takes no keys"),
        ("--enable-prefix-caching=False", "0.32", "--enable-prefix-caching takes no value"),
        ("--hf-overrides.a 5 --hf-overrides.a.b 6", "0.32", "a is 5 and has keys"),
        ("--task embed", "0.10", "--task embed cannot be simulated"),
        ("--cpu-offload-gb 1", "0.32", "Offloading of weights is not modelled"),
    ],
)  # fmt: skip
def test_what_a_release_or_the_model_has_not_is_refused(words: str, version: str, message: str) -> None:
    with pytest.raises(InputError, match=r"cannot|has no|can mean|takes|has keys") as caught:
        parse_serve_command(
            f"vllm serve m {words.replace('{', chr(39) + '{').replace('}', '}' + chr(39))}", version=version
        )
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "--cpu-offload-gb 0",
        "--task generate",
        "--kv-transfer-config ''",
    ],
)
def test_what_asks_for_nothing_passes(words: str) -> None:
    command = parse_serve_command(f"vllm serve m {words}", version="0.10" if "task" in words else "0.32")
    assert (command.flags, command.widening) == ({}, ())


def test_flags_of_0_10() -> None:
    words = f"vllm serve Q/m {FLAGS} --disable-log-requests --swap-space 16"
    command = parse_serve_command(words, version="0.10")
    assert command.flags == TAKEN
    assert command.ignored == ("--disable-log-requests", "--swap-space")


def test_other_kernels_graphs_and_processes_widen_the_band(tmp_path: Path) -> None:
    """Each by 10 %: two flags and a variable, beside a variable and a flag that change nothing."""
    command = (
        "VLLM_LOGGING_LEVEL=DEBUG VLLM_ATTENTION_BACKEND=FLASHINFER vllm serve m "
        "--compilation-config '{\"mode\":0}' --attention-backend FLASHINFER --port 80 "
        "--distributed-executor-backend mp"
    )
    plain = deployed(tmp_path)
    changed = deployed(tmp_path, command=command)
    assert plain.error_band is not None
    assert changed.error_band == pytest.approx(plain.error_band + 0.3)
    notes = "\n".join(changed.notes)
    assert "VLLM_ATTENTION_BACKEND=FLASHINFER, --compilation-config, --attention-backend" in notes
    assert "flags without effect here: --port, --distributed-executor-backend" in notes


def test_a_release_to_come_widens_the_band(tmp_path: Path) -> None:
    known = deployed(tmp_path, version="0.33")
    unknown = deployed(tmp_path, version="0.35")
    assert known.error_band is not None
    assert unknown.error_band == pytest.approx(known.error_band + 0.1)


def test_broken_commands_get_a_message() -> None:
    """Cut, doubled and jumbled texts, and lists of anything: an InputError, or a command."""
    rng = random.Random(0)
    image = "docker run -e B='c d' --rm vllm/vllm-openai:v0.9.1"
    whole = f"A=1 {image} --model Q/m {FLAGS} --hf-overrides.a.b 1 -O3 & # x"
    pieces = [
        "-",
        "--",
        "'",
        '"',
        "\\",
        "=",
        ".",
        "#",
        "&",
        "\n",
        "vllm",
        "serve",
        "run",
        "-c",
        "--hf-overrides.a",
        "[",
        "args:",
    ]
    odd: list[Any] = [None, 1, 2.5, True, [], ["a"], {"args": 3}, {}, [None, {"a": 1}], {"command": {"a": 1}}]
    for _ in range(300):
        words = whole.split(" ")
        for _ in range(rng.randint(1, 4)):
            words.insert(rng.randrange(len(words)), rng.choice(pieces))
            del words[rng.randrange(len(words))]
        text = " ".join(words)[rng.randint(0, 5) :]
        odd += [text, text[: rng.randrange(len(text))], words]
    messages = 0
    for given in odd:
        try:
            parse(EngineFlags, {"version": "0.32", "command": given}, source="test")
        except InputError:
            messages += 1
    assert 200 < messages < len(odd)


def test_the_v0_engine_is_refused() -> None:
    with pytest.raises(InputError, match="Only the V1 engine is modelled"):
        parse_serve_command("VLLM_USE_V1=0 vllm serve m")
    assert parse_serve_command("VLLM_USE_V1=1 vllm serve m").widening == ()


def test_a_variable_that_asks_for_the_default_widens_nothing() -> None:
    """VLLM_USE_DEEP_GEMM is 1 without it (vllm/envs.py, 0.20 to 0.33)."""
    assert parse_serve_command("VLLM_USE_DEEP_GEMM=1 vllm serve m").widening == ()
    assert parse_serve_command("VLLM_USE_DEEP_GEMM=0 vllm serve m").widening == ("VLLM_USE_DEEP_GEMM=0",)


@pytest.mark.parametrize(
    ("served", "said"),
    [
        ("Qwen/Qwen3-4B", True),
        ("Qwen/Qwen2.5-0.5B-Instruct-AWQ", True),
        ("Qwen/Qwen2.5-0.5B-Instruct", False),
        ("qwen2.5-0.5b", False),
        ("/models/anything", False),
        ("$MODEL", False),
    ],
)
def test_a_command_of_another_model_is_said(tmp_path: Path, served: str, said: bool) -> None:
    notes = deployed(tmp_path, command=f"vllm serve {served}").notes
    assert any(note.startswith(f"the command serves {served}, but") for note in notes) == said


def test_the_release_of_the_image_is_held_against_the_scenarios() -> None:
    text = "docker run vllm/vllm-openai:v0.10.2 --model m"
    engine = parse(EngineFlags, {"version": "0.32", "command": text}, source="test")
    assert Vllm().notes(engine) == ("the command's image is vLLM 0.10.2, engine.version says 0.32",)
    same = parse(EngineFlags, {"version": "0.10", "command": text}, source="test")
    assert "image" not in " ".join(Vllm().notes(same))


def test_a_connector_that_is_not_modelled_is_refused_with_its_field_said_once() -> None:
    """The recipe of vLLM's store on Mooncake, as its guide has it."""
    given = '{"kv_connector":"MooncakeStoreConnector","kv_role":"kv_both"}'
    command = f"vllm serve Qwen/Qwen3-8B --kv-transfer-config '{given}'"
    flags = EngineFlags(version="0.32", **parse_serve_command(command).flags)
    with pytest.raises(PydanticCustomError) as caught:
        Vllm().check(flags)
    assert (caught.value.context or {})["at"] == "kv_transfer_config"
