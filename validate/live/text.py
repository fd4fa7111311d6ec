"""What a live session comes to, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from servecast.validate.compare.sweep import Comparison
from servecast.validate.compare.text import comparison_text


def ends(kept: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to say of a result besides the comparison."""
    server, added = kept["server"] or {}, kept["proxy_added_latency_ms"]
    return {
        "vllm": server.get("version"),
        "kv blocks": server.get("num_gpu_blocks"),
        "gpu": kept["machine"]["gpu"],
        "date": kept["date"],
        **{
            f"predicted {each['metric'].replace('_', ' ')}": "{} to {} requests/s".format(
                *("-" if end is None else f"{end:.4g}" for end in each["between"])
            )
            for each in kept["searches"]
        },
        **({} if added is None else {"latency that the proxy adds": f"{added:.3g} ms"}),
        "servecast": kept["servecast_version"],
    }


def print_session(comparison: Comparison, kept: Mapping[str, Any]) -> None:
    """The comparison, what it rests on, and the hashes of what was predicted before."""
    print(comparison_text(comparison))
    print()
    for name, value in ends(kept).items():
        print(f"{name}: {'-' if value is None else value}")
    hashes = {f"prediction of {load['name']}": load["prediction_sha256"] for load in kept["loads"]}
    hashes |= {f"search of {each['plan']}": each["sha256"] for each in kept["searches"]}
    for name, sha256 in hashes.items():
        print(f"{name}: sha256 {sha256}")
