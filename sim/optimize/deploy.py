"""A deployment as files: the ``vllm serve`` line, a Kubernetes Deployment, and values for llm-d's chart."""

from __future__ import annotations

import json
import math
import re
import shlex
from typing import Any

import yaml

from servecast.sim.scenario.deployment import Deployment
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.scenario import Scenario
from servecast.sim.scenario.vllm_flags import TAKEN, other_flags

PORT = 8000
OF_CHART = ("port", "served_model_name")  # flags that llm-d's chart sets itself
DISK = 1.2  # of the weights, for a volume that holds the model


def deployment_files(deployment: Deployment, replicas: int) -> dict[str, str]:
    """The files by their names: so many replicas of a deployment. Where the scenario does not say what the
    model is called, its config's name stands in the place of it."""
    scenario = deployment.scenario
    model = deployment.served_name
    flags, others = _flags(scenario), _others(scenario)
    words = [word for each in others.values() for word in each]
    port = int(others["port"][1]) if "port" in others else PORT
    kind = "amd" if deployment.gpu.name.startswith("MI") else "nvidia"
    gpus = scenario.engine.gpus
    release = scenario.engine.version + ".0" * (2 - scenario.engine.version.count("."))
    image = f"vllm/vllm-openai{'-rocm' if kind == 'amd' else ''}:v{release}"
    where = (
        f"# {replicas} replicas of {gpus} {deployment.gpu.name} each: pick their nodes with a nodeSelector.\n"
    )
    name = re.sub(r"[^a-z0-9]+", "-", f"vllm-{model.rpartition('/')[2]}".lower()).strip("-")[:50].strip("-")
    pod = {
        "containers": [
            {
                "name": "vllm",
                "image": image,
                "command": ["vllm", "serve"],
                "args": [model, *flags, *words],
                "ports": [{"containerPort": port, "name": "http"}],
                "resources": {"limits": {f"{kind}.com/gpu": gpus}},
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
    labels = {"app": name}
    kubernetes = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    ranks = scenario.engine.tensor_parallel_size
    weights = deployment.shard.weight_bytes * ranks
    limits = {"resources": {"limits": {f"{kind}.com/gpu": gpus}}} if gpus > ranks else {}  # else the chart's
    llmd = {
        "modelArtifacts": {
            "name": others.get("served_model_name", ["", model])[1],
            "uri": f"hf://{model}",
            "size": f"{math.ceil(DISK * weights / (1 << 30) / 10) * 10}Gi",
        },
        "accelerator": {"type": kind},
        "routing": {"servicePort": port, "proxy": {"enabled": False}},
        "decode": {
            "create": True,
            "replicas": replicas,
            "parallelism": {"tensor": ranks},
            "containers": [
                {
                    "name": "vllm",
                    "image": image,
                    "modelCommand": "vllmServe",
                    "args": [
                        *_flags(scenario, without=("tensor_parallel_size",)),
                        *(word for name, each in others.items() if name not in OF_CHART for word in each),
                    ],
                    "ports": [{"containerPort": port, "name": "metrics", "protocol": "TCP"}],
                    "mountModelVolume": True,
                    **limits,
                }
            ],
        },
        "prefill": {"create": False},
    }
    return {
        "vllm-serve.sh": f"{where}{shlex.join(['vllm', 'serve', model, *flags, *words])}\n",
        "deployment.yaml": where + _yaml(kubernetes),
        "llm-d-values.yaml": f"# For the chart llm-d-modelservice.\n{where}{_yaml(llmd)}",
    }


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(json.loads(json.dumps(document)), sort_keys=False, width=100)  # without anchors


def _flags(scenario: Scenario, without: tuple[str, ...] = ()) -> list[str]:
    """The words of the flags that the scenario sets."""
    flags, words = scenario.engine, list[str]()
    for name in TAKEN:
        value = getattr(flags, name)
        if name in without or value == EngineFlags.model_fields[name].default:
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def _others(scenario: Scenario) -> dict[str, list[str]]:
    """The flags of a pasted command that the engine's model does not have, by name, with their words."""
    flags = scenario.engine
    return {} if flags.command is None else other_flags(flags.command, version=flags.version)
