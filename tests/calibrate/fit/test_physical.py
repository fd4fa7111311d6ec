"""The default constants against the public layer times of Llama-3.1-8B on an RTX 4090."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
from model_shapes import load
from places import DATA
from scipy.optimize import least_squares

from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.hardware.shard import Shard
from servecast.sim.hardware.step_time.physical import Efficiencies, PhysicalStepTime, smooth_maximum

PROFILE = DATA / "rtx4090_llama8b" / "profile"

LAYERS = 32
LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
GPU = find_gpu("RTX 4090")
TYPICAL = Efficiencies()
# kernel times only: no host; the card boosts past its rated clock and reaches its rated peak
MEASURED = Efficiencies(compute=1.0, host_fixed_s=0.0, host_per_seq_s=0.0)


@dataclass
class Step:
    chunks: tuple[tuple[int, int], ...]
    decodes: int
    decode_context: int
    samples: int


def dense() -> pd.DataFrame:
    """Seconds by layer kind (columns) and tokens (rows)."""
    table = pd.read_csv(PROFILE / "dense.csv")
    return table.pivot(index="tokens", columns="layer", values="time_us") * 1e-6


def test_overlap_exponent_and_efficiencies_of_the_linear_layers() -> None:
    tokens = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    measured = LAYERS * dense().loc[tokens, LINEAR].sum(axis=1).to_numpy()
    shard = Shard(load("Llama-3.1-8B-Instruct"), GPU, 1)

    def log_error(parameters: np.ndarray) -> np.ndarray:
        compute, bandwidth, exponent = parameters
        flops_s = shard.linear_flops_per_token / (GPU.bf16_flops * compute)
        bytes_s = shard.linear_bytes(1) / (GPU.bandwidth * bandwidth)
        return np.log([smooth_maximum(n * flops_s, bytes_s, exponent) for n in tokens] / measured)

    fit = least_squares(log_error, [0.8, 0.8, 3.0], bounds=([0.1, 0.1, 1.0], [1.0, 1.0, 20.0]))
    compute, bandwidth, exponent = fit.x
    assert compute == pytest.approx(1.0, abs=0.01)
    assert bandwidth == pytest.approx(TYPICAL.bandwidth, abs=0.01)
    assert exponent == pytest.approx(TYPICAL.overlap_exponent, abs=0.05)
    assert np.abs(fit.fun).mean() < 0.04
    sharp = log_error(np.array([compute, bandwidth, 20.0]))
    assert np.abs(sharp).mean() > 1.5 * np.abs(fit.fun).mean()


def test_small_kernels_of_a_layer() -> None:
    one = dense().loc[1]
    attention = pd.read_csv(PROFILE / "attention.csv")
    smallest = (
        attention.query("prefill_chunk == 0 and n_decode == 1 and kv_decode == 16")["time_us"].iloc[0] * 1e-6
    )
    layer = one["act_fn"] + 2 * one["layernorm"] + one["rotary_emb"] + smallest
    model = load("Llama-3.1-8B-Instruct")
    assert layer == pytest.approx(model.kernels / model.layers * TYPICAL.kernel_s, rel=0.1)


def composed() -> pd.DataFrame:
    """Steps put together from the measured layers: chunk and n (decodes) in tokens, the others in seconds."""
    layers = dense()
    layer = layers[[*LINEAR, "act_fn", "rotary_emb"]].sum(axis=1) + 2 * layers["layernorm"]
    rows = pd.read_csv(PROFILE / "per_sequence.csv").groupby("sequences")["time_us"].sum() * 1e-6
    step_time = PhysicalStepTime(Shard(load("Llama-3.1-8B-Instruct"), GPU, 1), MEASURED)
    out = []
    for row in pd.read_csv(PROFILE / "attention.csv").itertuples():
        chunk, n = row.prefill_chunk, row.n_decode
        samples = min(256, n + (chunk > 0))
        measured = LAYERS * (np.interp(chunk + n, layer.index, layer) + row.time_us * 1e-6)
        measured += np.interp(samples, rows.index, rows)
        step = Step(((chunk, row.kv_prefill),) if chunk else (), n, n * row.kv_decode, samples)
        out.append((chunk, n, measured, step_time.seconds(step), step_time.roofline_seconds(step)))
    return pd.DataFrame(out, columns=["chunk", "n", "measured", "predicted", "roofline"])


def test_whole_steps_put_together_from_the_layers() -> None:
    """Pure decode, pure prefill and mixed steps over contexts of 16 to 16,384, mean error in percent."""
    steps = composed()
    assert len(steps) > 8000
    assert (steps["roofline"] < steps["measured"]).all()
    error = 100 * (steps["predicted"] / steps["measured"] - 1).abs()
    decode, prefill = steps["chunk"] == 0, steps["n"] == 0
    assert error[decode].mean() < 5
    assert error[prefill].mean() < 6
    assert error[~decode & ~prefill].mean() < 8
