"""The GPU catalogue and GPUs of one's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from model_shapes import load as model_shape

from servecast.sim.hardware.gpu import CATALOGUE, GPU, find_gpu
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import PhysicalStepTime
from servecast.sim.inputs.errors import InputError

OWN = {
    "name": "mine",
    "memory_bytes": 24e9,
    "bandwidth": "1.0e12",
    "bf16_flops": 1e14,
    "link_bandwidth": 3.2e10,
    "capability": "8.9",
}


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("l4", "L4"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx-5080", "RTX 5080"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("h200", "H200"),
        ("b200", "B200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("h100-nvl", "H100 NVL"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA RTX PRO 5000 Blackwell", "RTX PRO 5000"),
        ("AMD Instinct MI325X", "MI325X"),
    ],
)
def test_names_as_people_and_drivers_write_them(spelling: str, name: str) -> None:
    assert find_gpu(spelling).name == name


def test_an_unknown_gpu_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"'TPU v5' is not in the catalogue.*L4, A10G.*B200"):
        find_gpu("TPU v5")


def test_the_catalogue_is_plausible() -> None:
    assert len({gpu.name for gpu in CATALOGUE}) == len(CATALOGUE) == 28
    for gpu in CATALOGUE:
        assert "https://" in gpu.source
        assert gpu.memory_source
        assert 30 < gpu.bf16_flops / gpu.bandwidth < 500  # FLOPs a byte at the ridge
        assert gpu.power is not None
        assert gpu.link_bandwidth is not None
        assert 0.2 < gpu.bf16_flops / gpu.power / 1e12 < 3  # TFLOP/s a watt
        assert gpu.fp8_flops is None or gpu.fp8_flops == pytest.approx(2 * gpu.bf16_flops, rel=0.02)
    assert find_gpu("4090").memory_bytes == pytest.approx(25_250_627_584, rel=1e-4)


def test_fp8_weights_run_at_bf16_without_fp8_units() -> None:
    assert find_gpu("A100").linear_flops(1) == 312e12
    assert find_gpu("H100").linear_flops(1) == 1979e12
    assert find_gpu("H100").linear_flops(2) == 989e12


def test_a_gpu_of_ones_own(tmp_path: Path) -> None:
    yaml_file, json_file = tmp_path / "gpu.yaml", tmp_path / "gpu.json"
    yaml_file.write_text("\n".join(f"{key}: {value}" for key, value in OWN.items()))
    json_file.write_text(str(OWN).replace("'", '"'))
    expected = GPU("mine", 24_000_000_000, 1e12, 1e14, 3.2e10, (8, 9))
    assert GPU.from_mapping(OWN) == GPU.from_file(yaml_file) == GPU.from_file(json_file) == expected


def test_a_gpu_needs_only_what_it_must(tmp_path: Path) -> None:
    least = {name: OWN[name] for name in ("name", "memory_bytes", "bandwidth", "bf16_flops")}
    own = GPU.from_mapping(least)
    assert (own.link_bandwidth, own.capability, own.peer_to_peer) == (None, (0, 0), True)
    own.save(tmp_path / "own.json")
    assert GPU.from_file(tmp_path / "own.json") == own
    shape = model_shape("Qwen2.5-0.5B-Instruct")
    assert PhysicalStepTime(Shard(shape, own, 1))
    with pytest.raises(InputError, match="nothing says how fast the link between two mine is"):
        PhysicalStepTime(Shard(shape, own, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peer_to_peer": "yes"}, "peer_to_peer is 'yes'"),
        ({"link_bandwidth": "fast"}, "link_bandwidth is 'fast', not a positive number"),
        ({"power": 0}, "power is 0, not a positive number"),
        ({"bandwith": 1}, "gpu: bandwith: unknown field 'bandwith'"),
        ({"bandwidth": None}, "bandwidth is None, not a positive number"),
        ({"bf16_flops": -1}, "bf16_flops is -1, not a positive number"),
        ({"memory_bytes": "24 GB"}, "memory_bytes is '24 GB', not a positive number"),
        ({"capability": "new"}, "capability is 'new'"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        GPU.from_mapping({**OWN, **changes})
    assert message in str(caught.value)


def test_missing_fields_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gpu: bandwidth: bandwidth is missing"):
        GPU.from_mapping({key: value for key, value in OWN.items() if key != "bandwidth"})
    with pytest.raises(InputError, match="cannot read it"):
        GPU.from_file(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="is not a mapping"):
        GPU.from_file(tmp_path / "list.yaml")
