"""A scenario to begin with, made of a pasted command: a YAML file whose comments say what to fill in."""

from __future__ import annotations

import json
import re
import textwrap

from servecast.sim.engine.speculation import METHODS
from servecast.sim.hardware.gpu import find_gpu
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import parse
from servecast.sim.scenario.acceptance import ASSUMED_RATE
from servecast.sim.scenario.engine_flags import EngineFlags
from servecast.sim.scenario.pasted_command import WHERE
from servecast.sim.scenario.scenario import shipped_folder
from servecast.sim.scenario.vllm_flags import parse_serve_command
from servecast.sim.scenario.vllm_server import NEWEST

_PROPOSED = 0.5  # share of steps in which a text that nobody knows repeats itself; assumed
_LONGEST = {"prompt": 8000, "output": 1000}  # tokens, where max_model_len leaves room


def starter(command: str, gpu: str = "H100") -> str:
    """The file's text.

    Args:
        command: ``vllm serve ...``, ``docker run ...``, or a container's arguments.
        gpu: name of the GPU.

    Raises:
        InputError: it is no such command, a flag of it is not modelled, or the GPU is not known.
    """
    parsed = parse_serve_command(command)
    if parsed.model is None:
        raise InputError("it names no model", where=WHERE, fix="Add it: vllm serve Qwen/Qwen3-8B ...")
    release = parsed.release or NEWEST
    flags = parse(EngineFlags, {"version": release, **parsed.flags}, source=WHERE)
    gpu = find_gpu(gpu, where="--gpu").name
    model = parsed.model
    config, hint = _config(model)
    longest = parsed.flags.get("max_model_len")
    room = longest if isinstance(longest, int) and longest > 0 else 1 << 30
    prompt, output = min(_LONGEST["prompt"], room * 3 // 4), min(_LONGEST["output"], room // 4)
    name = re.sub(r"[^a-z0-9.]+", "-", model.rpartition("/")[2].lower()).strip("-")
    return f"""\
# A scenario of servecast. Fill in the lines marked with <--, then ask, for instance:
#   servecast plan FILE.yaml                       how many requests a second can it serve?
#   servecast optimize FILE.yaml --target-rate 20 --gpus h100,h200 --tensor-parallel 1,2
# Every field: docs/scenario.md. What is wrong in here is told with the field and what to do.
schema_version: 1
name: {name}
model: {{config: {json.dumps(config)}}}  # {hint}
gpu: {{name: {json.dumps(gpu)}}}  # <-- of one rank; `servecast gpus` lists the names
engine:
  version: "{release}"  # <-- vLLM's release
  command: |
{textwrap.indent(command.strip(), "    ")}
workload:  # <-- what your users send
  arrivals: {{kind: poisson, request_rate: 5}}  # requests a second, for `simulate`
  num_requests: 1000
  prompt_tokens: {{kind: lognormal, median: {prompt // 8}, sigma: 0.8, max_tokens: {prompt}}}
  output_tokens: {{kind: lognormal, median: {output // 4}, sigma: 0.7, max_tokens: {output}}}
slo: ["ttft:p95:500", "tpot:p95:50"]  # <-- latency, statistic, milliseconds
{_acceptance(flags)}\
# gpu_hour_cost: 3.0  # what one GPU costs an hour, for the cost of tokens
"""


def _acceptance(flags: EngineFlags) -> str:
    """The line that says how many drafts are accepted, where the command drafts and does not say it."""
    drafts = flags.speculative_config
    if drafts is None or drafts.rejection_sample_method == "synthetic":
        return ""
    law = "assumed: true" + f", proposed: {_PROPOSED:g}" * METHODS[drafts.kind].may_miss
    better = "better {metrics: FILE}, of your server's /metrics"
    return f"acceptance: {{{law}}}  # <-- {ASSUMED_RATE:g} a draft, a guess; {better}\n"


def _config(model: str) -> tuple[str, str]:
    """The config of a model, and a comment: a shipped one's name if there is one, else a file's."""
    wanted = model.rpartition("/")[2].casefold()
    for path in sorted((shipped_folder() / "models").glob("*.json")):
        if path.stem.casefold() == wanted:
            return path.stem, "shipped; `servecast models` lists them, and a path of a config.json does, too"
    return "config.json", f"<-- put the file of {model} beside this one"
