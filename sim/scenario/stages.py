"""``vllm serve``'s flags of pipeline parallelism: what they come to, and what vLLM refuses of them."""

from __future__ import annotations

from dataclasses import replace

from servecast.sim.engine.rules import since
from servecast.sim.fleet.spec import GpuSpec
from servecast.sim.hardware.model_shape import ModelShape
from servecast.sim.hardware.shard import Shard, layers_of_stages
from servecast.sim.inputs.errors import InputError
from servecast.sim.scenario.engine_flags import EngineFlags

NETWORK = 50e9  # bytes/s each way of a GPU's own port to other nodes, 400 Gbit/s; assumed
_V2_SINCE = "0.29"  # for all models, on CUDA
_DENSE_SINCE = "0.25"
_V2_MODELS = {  # 0.22 to 0.28: config.vllm.DEFAULT_V2_MODEL_RUNNER_ARCHITECTURES, by the config's model_type
    "0.22": ("qwen3",),
    "0.23": ("llama", "mistral", "qwen3"),
    "0.24": ("qwen3", "deepseek_v2", "qwen2_moe", "granitemoe", "llama", "mistral"),
    "0.25": ("deepseek_v2", "qwen2_moe", "granitemoe"),
}


def runs_on_v2(model: ModelShape, release: str) -> bool:
    """Whether a release runs the model on its Model Runner V2 (VllmConfig.use_v2_model_runner)."""
    if since(release, _V2_SINCE):
        return True
    named = _V2_MODELS.get(min(release, _DENSE_SINCE), ())
    if since(release, _DENSE_SINCE):
        return not model.keeps_states and (model.model_type in named or not model.moe_layers)
    plain = not model.moe_layers and model.weight_bytes_each == model.dtype_bytes
    return model.model_type in named and (plain or release == "0.24")


def asynchronous(flags: EngineFlags, model: ModelShape, release: str, where: str) -> bool | None:
    """``async_scheduling`` with stages; None: the release's default.

    Raises:
        InputError: vLLM refuses it.
    """
    if flags.pipeline_parallel_size == 1 or runs_on_v2(model, release):
        return flags.async_scheduling
    if not since(release, "0.31"):
        return flags.async_scheduling
    if flags.async_scheduling:
        raise InputError(
            "async_scheduling with pipeline stages and without Model Runner V2",
            where=f"{where}.async_scheduling",
            fix="Leave it out: vLLM refuses this.",
        )
    return False


def pipeline(flags: EngineFlags, model: ModelShape, where: str) -> tuple[int, ...]:
    """Layers of each stage; empty for one stage.

    Raises:
        InputError: there are more stages than layers, or they are not modelled together with other flags.
    """
    stages = flags.pipeline_parallel_size
    if stages == 1:
        return ()
    if stages > model.layers:
        raise InputError(
            f"{stages} stages of the {model.layers} layers of {model.name}",
            where=f"{where}.pipeline_parallel_size",
            fix="Use fewer: vLLM refuses this.",
        )
    if flags.data_parallel_size > 1 and model.moe_layers:
        raise InputError(
            "pipeline stages of engine cores that step together are not modelled",
            where=f"{where}.pipeline_parallel_size",
            fix="Use one of the two.",
        )
    given = flags.pp_layer_partition
    if given is None:
        return layers_of_stages(model.layers, stages)
    if len(given) != stages or sum(given) != model.layers:
        raise InputError(
            f"pp_layer_partition {given} of {model.layers} layers in {stages} stages",
            where=f"{where}.pp_layer_partition",
            fix="Give the layers of each stage: vLLM refuses this.",
        )
    return tuple(given)


def over_nodes(shard: Shard, spec: GpuSpec) -> Shard:
    """Its stages laid out over nodes: as many in one as there is room for."""
    if not shard.pipeline:
        return shard
    network = NETWORK if spec.network_gb_per_s is None else spec.network_gb_per_s * 1e9
    room = max(1, spec.per_node // shard.tensor_parallel_size)
    return replace(shard, stages_per_node=room, network=network)


def note(shard: Shard, spec: GpuSpec) -> str | None:
    """Said where the way between nodes is assumed."""
    stages = len(shard.pipeline)
    if stages <= shard.stages_per_node or spec.network_gb_per_s is not None:
        return None
    return (
        f"pipeline stages lie in {-(-stages // shard.stages_per_node)} nodes, and the network between them "
        f"is assumed to take {NETWORK / 1e9:g} GB/s from each GPU (gpu.network_gb_per_s)"
    )
