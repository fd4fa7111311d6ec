"""A deployment as files: the ``vllm serve`` line, a Kubernetes Deployment, and values for llm-d's chart."""

from __future__ import annotations

import json
import math
import re
import shlex

from jinja2 import Environment, PackageLoader, StrictUndefined

from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.serve_flags import partition, set_flags
from servecast.sim.scenario.vllm_flags import PARTITION, other_flags

PORT = 8000
OF_CHART = ("port", "served_model_name")  # flags that llm-d's chart sets itself
DISK = 1.2  # of the weights, for a volume that holds the model


def deployment_files(deployment: Deployment, replicas: int) -> dict[str, str]:
    """The files by their names: so many replicas, or as many prefill and decode servers as they stand for.
    Where the scenario does not say what the model is called, its config's name stands in the place of it."""
    scenario, model = deployment.scenario, deployment.served_name
    fleet, servers = scenario.fleet, [_Servers("decode", deployment, replicas, model)]
    if fleet.prefill:
        times, pools = replicas // fleet.size, (("prefill", fleet.prefill), ("decode", fleet.decode))
        servers = [
            _Servers(role, Deployment.of(scenario.of_replica(spec)), times * spec.count, model, role)
            for role, pool in pools
            for spec in pool
        ]
    environment = Environment(
        loader=PackageLoader("servecast.sim.optimize", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = json.dumps  # which is YAML, too
    known = {"servers": servers, "last": servers[-1], "pools": bool(fleet.prefill), "variable": PARTITION}
    return {"vllm-serve.sh": "".join(f"{each.where}{each.command}\n" for each in servers)} | {
        name: environment.get_template(f"{name}.j2").render(known)
        for name in ("deployment.yaml", "llm-d-values.yaml")
    }


class _Servers:
    """Servers that are alike. role: in llm-d's chart; pool: prefill or decode, where there are both."""

    def __init__(self, role: str, deployment: Deployment, count: int, model: str, pool: str = "") -> None:
        engine, gpu, shard = deployment.scenario.engine, deployment.gpu.name, deployment.shard
        self.role, self.count, self.model = role, count, model
        self.kind = "amd" if gpu.startswith("MI") else "nvidia"
        others = {} if engine.command is None else other_flags(engine.command, version=engine.version)
        self.port = int(others["port"][1]) if "port" in others else PORT
        self.called = others.get("served_model_name", ["", model])[1]
        ranks, cores = engine.tensor_parallel_size, engine.data_parallel_size
        weights = shard.weight_bytes * ranks if cores == 1 else shard.whole.weight_bytes
        self.disk = math.ceil(DISK * weights / (1 << 30) / 10) * 10
        self.parallelism = {"tensor": ranks} | ({} if cores == 1 else {"data": cores})
        self.several_stages = engine.pipeline_parallel_size > 1
        self.limits = {f"{self.kind}.com/gpu": engine.gpus}
        servers = f"{pool} server{'s' * (count != 1)}" if pool else "replicas"
        self.where = (
            f"# {count} {servers} of {engine.gpus} {gpu} each: pick their nodes with a nodeSelector.\n"
        )
        self.where += "# Put the path of each adapter in the place of PATH.\n" if engine.lora_modules else ""
        transfer = [] if not pool or engine.kv_transfer_config else _transfer(pool)
        self.words = [*set_flags(engine), *transfer, *(word for each in others.values() for word in each)]
        self.chart_words = [
            *set_flags(engine, ("tensor_parallel_size", "data_parallel_size")),
            *transfer,
            *(word for name, each in others.items() if name not in OF_CHART for word in each),
        ]
        self.layers = partition(engine)
        variable = f"{PARTITION}={self.layers} " * bool(self.layers)
        self.command = variable + shlex.join(["vllm", "serve", model, *self.words])
        release = engine.version + ".0" * (2 - engine.version.count("."))
        self.image = f"vllm/vllm-openai{'-rocm' if self.kind == 'amd' else ''}:v{release}"
        name = re.sub(r"[^a-z0-9]+", "-", f"vllm-{model.rpartition('/')[2]}".lower()).strip("-")
        name = name[:50].strip("-")
        self.labels = {"app": name} | ({"llm-d.ai/role": pool} if pool else {})
        self.name = name + (f"-{pool}" if pool else "")


def _transfer(pool: str) -> list[str]:
    role = "kv_producer" if pool == "prefill" else "kv_consumer"
    return ["--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": role})]
