"""A deployment as files: the ``vllm serve`` line, a Kubernetes Deployment, and values for llm-d's chart."""

from __future__ import annotations

import json
import math
import re
import shlex
from typing import Any

import yaml

from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.scenario.serve_flags import partition, set_flags
from servecast.sim.scenario.vllm_flags import PARTITION, other_flags

PORT = 8000
OF_CHART = ("port", "served_model_name")  # flags that llm-d's chart sets itself
DISK = 1.2  # of the weights, for a volume that holds the model


def deployment_files(deployment: Deployment, replicas: int) -> dict[str, str]:
    """The files by their names: so many replicas, or as many prefill and decode servers as they stand for.
    Where the scenario does not say what the model is called, its config's name stands in the place of it."""
    scenario = deployment.scenario
    fleet, servers = scenario.fleet, [_Servers("decode", deployment, replicas, deployment.served_name)]
    if fleet.prefill:
        times, pools = replicas // fleet.size, (("prefill", fleet.prefill), ("decode", fleet.decode))
        servers = [
            _Servers(
                role,
                Deployment.of(scenario.of_replica(spec)),
                times * spec.count,
                deployment.served_name,
                role,
            )
            for role, pool in pools
            for spec in pool
        ]
    last, model = servers[-1], deployment.served_name
    llmd = {
        "modelArtifacts": {
            "name": last.others.get("served_model_name", ["", model])[1],
            "uri": f"hf://{model}",
            "size": f"{math.ceil(DISK * last.weights / (1 << 30) / 10) * 10}Gi",
        },
        "accelerator": {"type": last.kind},
        "routing": {"servicePort": last.port, "proxy": {"enabled": bool(fleet.prefill)}},
        **{each.role: each.of_chart for each in reversed(servers)},
        **({} if fleet.prefill else {"prefill": {"create": False}}),
    }
    where = "".join(each.where for each in servers)
    return {
        "vllm-serve.sh": "".join(f"{each.where}{each.command}\n" for each in servers),
        "deployment.yaml": "---\n".join(each.where + _yaml(each.kubernetes) for each in servers),
        "llm-d-values.yaml": f"# For the chart llm-d-modelservice.\n{where}{_yaml(llmd)}",
    }


class _Servers:
    """Servers that are alike. role: in llm-d's chart; pool: prefill or decode, where there are both."""

    def __init__(self, role: str, deployment: Deployment, count: int, model: str, pool: str = "") -> None:
        scenario, gpu = deployment.scenario, deployment.gpu.name
        self.role, self.kind = role, "amd" if gpu.startswith("MI") else "nvidia"
        self.others = _others(scenario)
        self.port = int(self.others["port"][1]) if "port" in self.others else PORT
        engine, gpus = scenario.engine, scenario.engine.gpus
        alone = engine.data_parallel_size == 1
        shard = deployment.shard
        ranks = engine.tensor_parallel_size
        self.weights = shard.weight_bytes * ranks if alone else shard.whole.weight_bytes
        servers = f"{pool} server{'s' * (count != 1)}" if pool else "replicas"
        self.where = f"# {count} {servers} of {gpus} {gpu} each: pick their nodes with a nodeSelector.\n"
        self.where += "# Put the path of each adapter in the place of PATH.\n" if engine.lora_modules else ""
        transfer = [] if not pool or scenario.engine.kv_transfer_config else _transfer(pool)
        flags, words = set_flags(engine) + transfer, [word for each in self.others.values() for word in each]
        layers = partition(engine)
        self.command = f"{PARTITION}={layers} " * bool(layers) + shlex.join(
            ["vllm", "serve", model, *flags, *words]
        )
        env = {"env": [{"name": PARTITION, "value": layers}]} if layers else {}
        release = scenario.engine.version + ".0" * (2 - scenario.engine.version.count("."))
        image = f"vllm/vllm-openai{'-rocm' if self.kind == 'amd' else ''}:v{release}"
        name = (
            re.sub(r"[^a-z0-9]+", "-", f"vllm-{model.rpartition('/')[2]}".lower()).strip("-")[:50].strip("-")
        )
        labels = {"app": name} | ({"llm-d.ai/role": pool} if pool else {})
        name += f"-{pool}" if pool else ""
        limits = {f"{self.kind}.com/gpu": gpus}
        pod = _pod(image, [model, *flags, *words], self.port, limits)
        pod["containers"][0] |= env
        self.kubernetes = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "labels": labels},
            "spec": {
                "replicas": count,
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod},
            },
        }
        self.of_chart = {
            "create": True,
            "replicas": count,
            "parallelism": {"tensor": ranks} | ({} if alone else {"data": engine.data_parallel_size}),
            "containers": [
                {
                    "name": "vllm",
                    "image": image,
                    "modelCommand": "vllmServe",
                    "args": [
                        *set_flags(engine, ("tensor_parallel_size", "data_parallel_size")),
                        *transfer,
                        *(word for key, each in self.others.items() if key not in OF_CHART for word in each),
                    ],
                    "ports": [{"containerPort": self.port, "name": "metrics", "protocol": "TCP"}],
                    "mountModelVolume": True,
                    **env,
                    **({"resources": {"limits": limits}} if engine.pipeline_parallel_size > 1 else {}),
                }
            ],
        }


def _transfer(pool: str) -> list[str]:
    role = "kv_producer" if pool == "prefill" else "kv_consumer"
    return ["--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", "kv_role": role})]


def _pod(image: str, args: list[str], port: int, limits: dict[str, int]) -> dict[str, Any]:
    return {
        "containers": [
            {
                "name": "vllm",
                "image": image,
                "command": ["vllm", "serve"],
                "args": args,
                "ports": [{"containerPort": port, "name": "http"}],
                "resources": {"limits": limits},
                "readinessProbe": {"httpGet": {"path": "/health", "port": port}, "periodSeconds": 5},
                "startupProbe": {
                    "httpGet": {"path": "/health", "port": port},
                    "periodSeconds": 10,
                    "failureThreshold": 180,
                },
                "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
            }
        ],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(json.loads(json.dumps(document)), sort_keys=False, width=100)  # without anchors


def _others(scenario: Scenario) -> dict[str, list[str]]:
    """The flags of a pasted command that the engine's model does not have, by name, with their words."""
    flags = scenario.engine
    return {} if flags.command is None else other_flags(flags.command, version=flags.version)
