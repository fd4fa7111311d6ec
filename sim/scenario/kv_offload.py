"""KV cache that a deployment keeps outside of its GPUs: how much, over which links, and its connectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from servecast.sim.engine.config import EngineConfig
from servecast.sim.engine.connector import Connector
from servecast.sim.engine.copies import LinkedCopies
from servecast.sim.engine.lmcache import LMCacheConnectorV1, LMCacheMPConnector
from servecast.sim.engine.multi_connector import MultiConnector
from servecast.sim.engine.offloading import OffloadingConnector
from servecast.sim.engine.pipe import Pipe
from servecast.sim.engine.rules import since
from servecast.sim.engine.tiers import Hierarchy, Tier
from servecast.sim.hardware.gpu import GPU
from servecast.sim.hardware.host import BLOCK_S, HostLink, host_link, host_memory
from servecast.sim.hardware.memory import KVMemory
from servecast.sim.hardware.shard import Shard
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Model, NonNegative, Positive, did_you_mean
from servecast.sim.scenario.kv_transfer import KVTransfer

CONNECTORS = ("OffloadingConnector", "LMCacheConnectorV1", "LMCacheMPConnector")
GIB = 1 << 30
_PAGE = 4096  # what vLLM rounds a chunk in host memory up to
_UNBOUNDED = 1 << 40  # chunks of a store that nobody has told the size of


class KVOffload(Model):
    """What KV cache outside of GPUs lies in, and goes over. Where defaults come from is in
    [Offloading](offloading.md)."""

    host_gb_per_s: Positive | None = None
    """Between one GPU and its host's memory, GB/s each way, as large copies reach it. Default, by the GPU."""
    block_us: NonNegative = BLOCK_S * 1e6
    """What one block of a copy takes, beside its bytes."""
    host_memory_gib: Positive | None = None
    """Memory of a server that holds ``gpu.per_node`` GPUs. Default, that of the GPU maker's own server, where
    it makes one; else it is not checked."""
    disk_gb_per_s: Positive = 5.0
    """Of a server's disk, GB/s each way. Assumed: one NVMe drive of PCIe 4 reads 7 and writes 5."""
    disk_latency_us: NonNegative = 100.0
    """Of an access to it. Assumed."""
    remote_gb_per_s: Positive = 10.0
    """Of the remote store, GB/s each way, which all replicas share. Assumed: most of 100 Gb/s."""
    remote_latency_ms: NonNegative = 1.0
    """Of an access to it. Assumed."""
    remote_gib: Positive | None = None
    """What the remote store holds. Default, all."""
    lmcache_server_gib: Positive | None = None
    """Host memory of LMCache's server, which LMCacheMPConnector needs: ``lmcache server --l1-size-gb``."""
    lmcache_servers: Literal["one_each", "one"] = "one_each"
    """Whether each replica has an LMCache server of its own, or all share one (on one node)."""
    lookup_ms: NonNegative = 1.0
    """Until LMCache's server answers a look-up. Assumed."""


class Shared:
    """What the replicas of a run have in common, made when the first of them asks for it."""

    def __init__(self) -> None:
        self._tiers: dict[str, Tier] = {}

    def tier(self, made: Tier) -> Tier:
        """The one of that name."""
        return self._tiers.setdefault(made.name, made)


@dataclass(frozen=True, slots=True)
class Offloading:
    """The connectors of a replica, and what they have.

    Attributes:
        transfer: as configured. spec: the hardware. link: between a GPU and its host.
        ranks, block_size, block_bytes: of the deployment; bytes on one rank. copies: ranks whose bytes are
        all different. release: of vLLM. settings: LMCache's.
    """

    transfer: KVTransfer
    spec: KVOffload
    link: HostLink
    ranks: int
    block_size: int
    block_bytes: int
    copies: int
    release: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    # ---- sizes

    @property
    def native(self) -> KVTransfer | None:
        """The OffloadingConnector, if there is one."""
        return self.transfer.of("OffloadingConnector")

    @property
    def blocks_per_chunk(self) -> int:
        """Of the OffloadingConnector."""
        extra = self.native.extra if self.native is not None else {}
        return int(extra.get("blocks_per_chunk") or int(extra.get("block_size", 0)) // self.block_size or 1)

    @property
    def native_chunks(self) -> int:
        """Chunks in host memory (CPUOffloadingSpec.__init__)."""
        assert self.native is not None
        copies = self.copies if since(self.release, "0.27") else self.ranks
        chunk = self.block_bytes * self.blocks_per_chunk * copies
        page = _PAGE if since(self.release, "0.27") else 1
        return int(self.native.extra["cpu_bytes_to_use"]) // (-(-chunk // page) * page)

    @property
    def lmcache_chunk(self) -> tuple[int, int]:
        """Tokens of a chunk of LMCache, and its bytes on one rank."""
        tokens = int(self.settings["chunk_size"])
        return tokens, tokens // self.block_size * self.block_bytes

    def _lmcache_chunks(self, gib: float, ranks: int) -> int:
        """Chunks that so much memory of ``ranks`` ranks together holds."""
        return int(gib * GIB) // (self.lmcache_chunk[1] * ranks)

    @property
    def host_bytes(self) -> int:
        """Host memory that a replica takes for it."""
        total = 0.0
        for each in self.transfer.all():
            if each.connector == "OffloadingConnector":
                total += each.extra["cpu_bytes_to_use"]
            elif each.connector == "LMCacheConnectorV1":
                total += self.settings["max_local_cpu_size"] * GIB * self.ranks
            elif each.connector == "LMCacheMPConnector":
                total += (self.spec.lmcache_server_gib or 0.0) * GIB
        return int(total)

    # ---- links

    @property
    def load_s_per_token(self) -> float:
        """What a token takes on the link to the GPUs, all ranks at once."""
        seconds = self.block_bytes / self.link.bandwidth + self.link.block_s
        return seconds / self.block_size

    @property
    def stores_delay(self) -> bool:
        """Whether the steps that compute KV cache wait for its copy."""
        return self.transfer.of("LMCacheConnectorV1") is not None

    def _pipe(self) -> Pipe:
        """One way between a GPU and its host: a block's own time makes its bytes slower."""
        return Pipe(self.block_bytes / (self.block_bytes / self.link.bandwidth + self.link.block_s))

    # ---- connectors

    def connector(self, replica: int, shared: Shared) -> Connector:
        """The connector of a replica, with links of its own."""
        to_gpu, to_host = self._pipe(), self._pipe()
        made = [self._one(each, replica, shared, to_gpu, to_host) for each in self.transfer.all()]
        if not self.transfer.connectors:
            return made[0]
        return MultiConnector(made, self.transfer.role, self.transfer.load_failure_policy)

    def _one(self, each: KVTransfer, replica: int, shared: Shared, to_gpu: Pipe, to_host: Pipe) -> Connector:
        if each.connector == "OffloadingConnector":
            extra = each.extra
            made = OffloadingConnector(
                self.native_chunks,
                LinkedCopies(to_gpu, to_host, self.block_bytes),
                blocks_per_chunk=self.blocks_per_chunk,
                policy=extra.get("eviction_policy", "lru"),
                store_threshold=int(extra.get("store_threshold", 0)),
                offload_prompt_only=bool(extra.get("offload_prompt_only", since(self.release, "0.23"))),
                max_tracker_size=int(extra.get("max_tracker_size", 64_000)),
            )
            made.role, made.load_failure_policy = each.role, each.load_failure_policy
            return made
        tokens, chunk_bytes = self.lmcache_chunk
        tiers = Hierarchy(
            self._tiers(each, shared),
            to_gpu,
            to_host,
            chunk_tokens=tokens,
            chunk_bytes=chunk_bytes,
            copies=self.copies,
        )
        if each.connector == "LMCacheConnectorV1":
            return LMCacheConnectorV1(tiers, each.role, each.load_failure_policy, replica)
        return LMCacheMPConnector(
            tiers, each.role, each.load_failure_policy, replica, lookup_s=1e-3 * self.spec.lookup_ms
        )

    def _tiers(self, each: KVTransfer, shared: Shared) -> list[Tier]:
        spec, settings = self.spec, self.settings
        if each.connector == "LMCacheMPConnector":
            assert spec.lmcache_server_gib is not None
            host = Tier("cpu", self._lmcache_chunks(spec.lmcache_server_gib, self.copies))
            return [shared.tier(host) if spec.lmcache_servers == "one" else host]
        found = []
        if settings["local_cpu"]:
            found.append(Tier("cpu", self._lmcache_chunks(settings["max_local_cpu_size"], 1)))
        if settings["local_disk"]:
            disk = [Pipe(spec.disk_gb_per_s * 1e9, spec.disk_latency_us * 1e-6) for _ in range(2)]
            found.append(Tier("disk", self._lmcache_chunks(settings["max_local_disk_size"], 1), *disk))
        if settings["remote_url"]:
            links = [Pipe(spec.remote_gb_per_s * 1e9, spec.remote_latency_ms * 1e-3) for _ in range(2)]
            chunks = _UNBOUNDED
            if spec.remote_gib is not None:
                chunks = self._lmcache_chunks(spec.remote_gib, self.copies)
            found.append(shared.tier(Tier("remote", chunks, *links)))
        return found

    @property
    def shares(self) -> bool:
        """Whether replicas have something in common, so that one cannot be run without the others."""
        one = self.spec.lmcache_servers == "one" and self.transfer.of("LMCacheMPConnector") is not None
        return one or bool(self.settings["remote_url"])

    # ---- what is said of it

    def facts(self) -> dict[str, Any]:
        """What a result says of it."""
        found: dict[str, Any] = {
            "kv_connector": self.transfer.connector,
            "kv_role": self.transfer.role,
            "host_memory_bytes": self.host_bytes,
            "host_gb_per_s": self.link.bandwidth / 1e9,
            "host_link": self.link.origin,
        }
        if self.transfer.connectors:
            found["connectors"] = [each.connector for each in self.transfer.connectors]
        if self.native is not None:
            found["cpu_chunks"] = self.native_chunks
            found["cpu_tokens"] = self.native_chunks * self.blocks_per_chunk * self.block_size
        return found


_SETTINGS: dict[str, Any] = {  # of LMCache, with its defaults
    "chunk_size": 256,
    "local_cpu": True,
    "max_local_cpu_size": 5.0,
    "local_disk": None,
    "max_local_disk_size": 0.0,
    "remote_url": None,
}
_FIXED: dict[str, Any] = {  # settings of which only this value is modelled
    "cache_policy": "LRU",
    "remote_serde": "naive",
    "save_decode_cache": False,
    "save_unfull_chunk": False,
    "use_layerwise": False,
    "enable_async_loading": False,
    "enable_blending": False,
    "enable_p2p": False,
    "enable_pd": False,
    "min_retrieve_tokens": 0,
}
_HARMLESS = (
    "numa_mode",
    "pre_caching_hash_algorithm",
    "lmcache_instance_id",
    "lookup_timeout_ms",
    "log_level",
)
_BESIDE = {"use_native": None, "discard_partial_chunks": None, "skip_last_n_tokens": 0}  # None: any value


def lmcache_settings(extra: Mapping[str, Any], where: str) -> dict[str, Any]:
    """LMCache's settings of a ``kv_connector_extra_config``, ``lmcache.NAME``, with its defaults.

    Raises:
        InputError: one is not known or not modelled.
    """
    found = dict(_SETTINGS)
    for name, value in extra.items():
        key = name.removeprefix("lmcache.")
        if key == name:
            if name not in _BESIDE or (_BESIDE[name] is not None and value != _BESIDE[name]):
                raise InputError(f"{name!r} is not modelled", where=where, fix="Leave it out.")
        elif key in _SETTINGS:
            found[key] = _setting(value, _SETTINGS[key])
        elif key in _FIXED:
            if _setting(value, _FIXED[key]) != _FIXED[key]:
                raise InputError(
                    f"{name} {value!r} is not modelled", where=where, fix=f"{_FIXED[key]!r} is, its default."
                )
        elif key not in _HARMLESS and not key.startswith(("mp.", "internal_api")):
            fix = did_you_mean(key, [*_SETTINGS, *_FIXED]) or "Leave it out."
            raise InputError(f"LMCache's setting {key!r} is not modelled", where=where, fix=fix)
    return found


def _setting(value: Any, like: Any) -> Any:
    """As LMCache converts it, of the type of ``like``."""
    if isinstance(like, bool):
        return str(value).lower() in ("true", "1", "yes")
    if isinstance(like, int | float):
        return type(like)(value)
    return value or None


def offloading_of(
    transfer: KVTransfer | None,
    spec: KVOffload,
    shard: Shard,
    memory: KVMemory,
    config: EngineConfig,
    *,
    where: str,
) -> Offloading | None:
    """What a deployment keeps outside of its GPUs; None where it has no such connector.

    Raises:
        InputError: vLLM would refuse it, or it is not modelled.
    """
    if transfer is None or (not transfer.connectors and transfer.connector not in CONNECTORS):
        return None
    where = f"{where}: engine.kv_transfer_config"
    for each in transfer.all():
        if each.connector not in CONNECTORS:
            raise InputError(
                f"{each.connector} beside others in a MultiConnector is not modelled",
                where=where,
                fix=f"List {', '.join(CONNECTORS)} only.",
            )
    if memory.kv_groups:
        raise InputError(
            "offloading is modelled where all layers are managed as one kind, and these are by kind",
            where=where,
            fix="Set disable_hybrid_kv_cache_manager where layers have windows, or leave it out.",
        )
    link = host_link(shard.gpu)
    if spec.host_gb_per_s is not None:
        link = HostLink(spec.host_gb_per_s * 1e9, (1.0, 1.0), link.block_s, "given")
    link = HostLink(link.bandwidth, link.band, spec.block_us * 1e-6, link.origin)
    latent = any("mla" in layer.kind for layer in shard.model.cache_layers)
    lmcache = transfer.of("LMCacheConnectorV1", "LMCacheMPConnector")
    settings = lmcache_settings(lmcache.extra if lmcache is not None else {}, where)
    found = Offloading(
        transfer,
        spec,
        link,
        shard.tensor_parallel_size,
        memory.block_size,
        memory.bytes_per_block,
        1 if latent else shard.tensor_parallel_size,
        config.version,
        settings,
    )
    if found.native is not None:
        _check_native(found, where)
    if lmcache is not None:
        _check_lmcache(found, lmcache, where)
    return found


def _check_native(found: Offloading, where: str) -> None:
    """OffloadingSpec and CPUOffloadingSpec, and build_offloading_config."""
    assert found.native is not None
    extra, block = found.native.extra, found.block_size
    if not extra.get("cpu_bytes_to_use"):
        raise InputError(
            "the OffloadingConnector has no cpu_bytes_to_use",
            where=where,
            fix="Give it in kv_connector_extra_config, or kv_offloading_size: vLLM refuses it without.",
        )
    if extra.get("spec_name", "CPUOffloadingSpec") != "CPUOffloadingSpec":
        raise InputError(
            f"spec_name {extra['spec_name']!r} is not modelled", where=where, fix="Leave it out."
        )
    if extra.get("eviction_policy", "lru") not in ("lru", "arc"):
        raise InputError(
            f"eviction_policy {extra['eviction_policy']!r} is not vLLM's", where=where, fix="Use lru or arc."
        )
    if "blocks_per_chunk" in extra and not since(found.release, "0.26"):
        raise InputError(
            f"vLLM {found.release} has no blocks_per_chunk", where=where, fix="Give block_size, in tokens."
        )
    if "blocks_per_chunk" in extra and "block_size" in extra:
        raise InputError(
            "both block_size and blocks_per_chunk", where=where, fix="Give one: vLLM refuses both."
        )
    if int(extra.get("blocks_per_chunk", 1)) < 1 or int(extra.get("block_size", block)) % block:
        raise InputError(
            f"a chunk of {extra.get('block_size', extra.get('blocks_per_chunk'))}, where a KV block is "
            f"{block} tokens",
            where=where,
            fix=f"Give block_size as a multiple of {block}: vLLM refuses others.",
        )
    if found.native_chunks < 1:
        raise InputError(
            f"{extra['cpu_bytes_to_use']:,.0f} bytes hold no chunk of {found.blocks_per_chunk} blocks",
            where=where,
            fix="Raise kv_offloading_size.",
        )


def _check_lmcache(found: Offloading, each: KVTransfer, where: str) -> None:
    tokens, chunk_bytes = found.lmcache_chunk
    settings = found.settings
    if tokens < found.block_size or tokens % found.block_size:
        raise InputError(
            f"LMCache's chunks of {tokens} tokens are no multiple of a KV block's {found.block_size}",
            where=where,
            fix=f"Set lmcache.chunk_size to a multiple of {found.block_size}.",
        )
    if each.connector == "LMCacheMPConnector":
        if found.spec.lmcache_server_gib is None:
            raise InputError(
                "nothing says how much memory LMCache's server has: vLLM does not pass a size on to it",
                where=where,
                fix="Give kv_offload.lmcache_server_gib, the server's --l1-size-gb.",
            )
        return
    if not (settings["local_cpu"] or settings["local_disk"] or settings["remote_url"]):
        raise InputError(
            "LMCache has nowhere to keep a cache",
            where=where,
            fix="Set one of lmcache.local_cpu, lmcache.local_disk and lmcache.remote_url.",
        )
    if settings["max_local_cpu_size"] * GIB < chunk_bytes:
        raise InputError(
            f"max_local_cpu_size {settings['max_local_cpu_size']:g} GiB holds no chunk of LMCache",
            where=where,
            fix=f"Raise it: a chunk is {chunk_bytes / GIB:.3g} GiB on a rank.",
        )


def check_host_memory(found: Offloading, gpu: GPU, replicas: int, per_node: int, *, where: str) -> None:
    """Refuse more host memory than the replicas on a server can have, where it is known how much that is.

    Raises:
        InputError: it has less.
    """
    known, given = host_memory(gpu), found.spec.host_memory_gib
    if given is None and known is None:
        return
    if given is not None:
        size, gpus, whose = given * GIB, per_node, "kv_offload.host_memory_gib"
    else:
        assert known is not None
        (size, gpus), whose = known, f"{gpu.name}s' maker's server"
    together = min(replicas, max(1, gpus // found.ranks))
    if found.spec.lmcache_servers == "one" and found.transfer.of("LMCacheMPConnector") is not None:
        together = 1
    if found.host_bytes * together > size:
        raise InputError(
            f"{together} replicas on a server take {found.host_bytes * together / GIB:,.0f} GiB of host "
            f"memory for KV cache, and it has {size / GIB:,.0f} ({whose})",
            where=f"{where}: engine.kv_offloading_size",
            fix="Lower it, or say what the server has with kv_offload.host_memory_gib.",
        )
