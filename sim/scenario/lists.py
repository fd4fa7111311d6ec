"""What there is to name in a scenario: GPUs, models, profiles, as tables."""

from __future__ import annotations

import pandas as pd

from servecast.sim.hardware.gpu import CATALOGUE, find_gpu
from servecast.sim.hardware.model_families import ALIASES, FAMILIES, NOT_MODELLED
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard
from servecast.sim.scenario.basis import constants_of, shipped_profiles
from servecast.sim.scenario.scenario import shipped_folder


def gpus() -> pd.DataFrame:
    """The GPUs of the catalogue: what their makers state, and what a scenario without a profile rests on.

    Peaks are TFLOP/s, dense, with fp32 sums; "constants" says whose kernels were timed, and how the compute
    that they reach was scaled by power.
    """
    rows = []
    for gpu in CATALOGUE:
        near = constants_of(gpu)
        constants = "measured kernels" if near.gpu == gpu.name else f"kernels of the {near.gpu}"
        if near.compute_factor != 1.0:
            constants += f", compute times {near.compute_factor:.2f}"
        rows.append(
            {
                "gpu": gpu.name,
                "capability": "{}.{}".format(*gpu.capability),
                "memory_gib": gpu.memory_bytes / (1 << 30),
                "bandwidth_gb_s": gpu.bandwidth / 1e9,
                "bf16_tflops": gpu.bf16_flops / 1e12,
                "fp8_tflops": None if gpu.fp8_flops is None else gpu.fp8_flops / 1e12,
                "fp4_tflops": None if gpu.fp4_flops is None else gpu.fp4_flops / 1e12,
                "link_gb_s": None if gpu.link_bandwidth is None else gpu.link_bandwidth / 1e9,
                "power_w": gpu.power,
                "constants": constants,
                "source": gpu.source,
            }
        )
    return pd.DataFrame(rows)


def models() -> pd.DataFrame:
    """The models whose config.json is shipped. Others can be given as files.

    Weights and the KV cache are over all ranks and of the config's own dtypes.
    """
    gpu = find_gpu("H200")  # has kernels for all of them
    rows = []
    for file in sorted((shipped_folder() / "models").glob("*.json"), key=lambda path: path.stem.lower()):
        shape = ModelShape.from_config(file)
        whole = Shard(shape, gpu, 1)
        rows.append(
            {
                "model": file.stem,
                "architecture": shape.model_type,
                "weights_gib": whole.weight_bytes / (1 << 30),
                "layers": shape.layers,
                "hidden_size": shape.hidden_size,
                "heads": shape.heads,
                "kv_heads": shape.kv_heads,
                "experts": shape.experts or None,
                "kv_bytes_per_token": whole.kv_bytes_per_token,
                "max_position_embeddings": shape.max_position_embeddings,
            }
        )
    return pd.DataFrame(rows)


def refused() -> dict[str, str]:
    """model_type -> why a model of that type is refused. Others that are unknown are, too."""
    return dict(NOT_MODELLED)


def families() -> pd.DataFrame:
    """The families whose config.json is read, by model_type: how layers mix tokens, whether there are
    experts, and what is not modelled of them. Of a multimodal model it is the text part."""
    rows = [
        {
            "model_type": name,
            "attention": family.attention,
            "experts": "yes" if family.experts else None,
            "not_modelled": family.left_out or None,
            "also": ", ".join(alias for alias, of in ALIASES.items() if of == name) or None,
        }
        for name, family in sorted(FAMILIES.items())
    ]
    return pd.DataFrame(rows)


def profiles() -> pd.DataFrame:
    """The shipped profiles: of which GPU, model and server, how each came about, and its error band there."""
    rows = []
    for name, profile in shipped_profiles().items():
        rows.append(
            {
                "profile": name,
                "gpu": profile.gpu,
                "model": profile.model,
                "tensor_parallel_size": profile.tensor_parallel_size,
                "server": profile.server,
                "kind": profile.kind,
                "basis": "fitted to a report" if profile.fitted_rows else "measured",
                "error_band": profile.error_band,
            }
        )
    return pd.DataFrame(rows)
