"""inference-perf's workload file, field by field: what is modelled, told as without effect, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from servecast.sim.inputs.schema import Count, Flag, Model, NonNegative, Positive, invalid, parse
from servecast.sim.inputs.yaml_file import read_yaml
from servecast.sim.traffic.arrivals import Times
from servecast.sim.traffic.lengths import InferencePerfLengths

BURST_S = 5  # in which a sweep sends its burst
LOOK_S = 0.5  # between its looks at the requests in flight

Bounded = Annotated[Count, Field(le=10**8)]
MOST_REQUESTS = 10**8  # of a stage

_NETWORK = "it downloads its prompts"
_TURNS = "write its conversations as workload.sessions of a scenario, or give the trace as workload.trace"
NOT_MODELLED = {  # data.type -> why
    "shareGPT": _NETWORK,
    "cnn_dailymail": _NETWORK,
    "infinity_instruct": _NETWORK,
    "billsum_conversations": _NETWORK,
    "visionarena": _NETWORK,
    "otel_trace_replay": _TURNS,
    "weka_trace_replay": _TURNS,
    "conversation_replay": _TURNS,
    "mock": "it sends a few tokens, for tests of the client",
}
_LEAVE_OUT = "Leave it out to see the rest without it."


def _refuse(data: Any, reasons: dict[str, str]) -> None:
    """Refuse fields that are written and not modelled."""
    for name, why in reasons.items():
        if isinstance(data, dict) and data.get(name) not in (None, False, [], {}):
            raise invalid(f"{name}: {why}", _LEAVE_OUT, at=name)


class LoadStage(Model):
    """int(rate x duration) requests in ``duration`` seconds, or num_requests in a closed loop."""

    rate: Positive | None = None
    duration: Bounded | None = None
    num_requests: Bounded | None = None
    concurrency_level: Bounded | None = None


class LoadSweep(Model):
    """Stages up to the rate that saturates the server."""

    type: Literal["geometric", "linear"]
    num_requests: Bounded = 2000  # of the burst that looks for that rate, as is timeout
    timeout: Positive = 60.0
    num_stages: Annotated[Count, Field(le=1000)] = 5
    stage_duration: Bounded = 180
    saturation_percentile: Annotated[NonNegative, Field(le=100)] = 95.0

    def burst(self) -> LoadStage:
        """What it sends to find the rate."""
        return LoadStage(rate=self.num_requests / BURST_S, duration=BURST_S)

    def saturation_rate(self, sent_s: Times, done_s: Times) -> float | None:
        """The rate at which requests in flight fell between looks, at a percentile; None where they fell less
        than twice before the timeout.

        Args:
            sent_s, done_s: when the burst's requests were sent and done, in seconds from its start.
        """
        looks = np.arange(0.0, min(self.timeout, float(done_s.max()) + LOOK_S), LOOK_S)
        in_flight = np.searchsorted(np.sort(sent_s), looks, "right") - np.searchsorted(
            np.sort(done_s), looks, "right"
        )
        change = np.diff(in_flight)
        falls = -change[change < 0] / LOOK_S
        return float(np.percentile(falls, self.saturation_percentile)) if len(falls) > 1 else None

    def stages(self, saturation_rate: float) -> tuple[LoadStage, ...]:
        """Stages from 1 request/s to the saturation rate; those of a geometric one lie closer to it."""
        if self.type == "geometric":
            rates = 1 + saturation_rate - np.geomspace(saturation_rate, 1, self.num_stages)
        else:
            rates = np.linspace(1, saturation_rate, self.num_stages)
        return tuple(LoadStage(rate=round(float(rate), 2), duration=self.stage_duration) for rate in rates)


class Load(Model):
    """When requests are sent: the file's ``load``."""

    type: Literal["constant", "poisson", "concurrent"] = "constant"
    interval: NonNegative = 1.0
    stages: tuple[LoadStage, ...] = ()
    sweep: LoadSweep | None = None
    num_workers: Bounded | None = None
    worker_max_concurrency: Bounded = 100
    worker_max_tcp_connections: Count = 2500  # a session of its own for each request: without effect
    request_timeout: Positive | None = None
    base_seed: int | None = None
    circuit_breakers: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _modelled(cls, data: Any) -> Any:
        _refuse(
            data,
            {
                "lora_traffic_split": "LoRA adapters are not modelled",
                "trace": "give the file as workload.trace of a scenario instead",
            },
        )
        return data

    @model_validator(mode="after")
    def _complete(self) -> Load:
        closed = self.type == "concurrent"
        wanted, other = ("num_requests", "concurrency_level"), ("rate", "duration")
        if not closed:
            wanted, other = other, wanted
        for number, stage in enumerate(self.stages):
            for name in wanted:
                if getattr(stage, name) is None:
                    at = f"stages.{number}.{name}"
                    raise invalid(f"{name} is missing in a stage of a {self.type} load", "Add it.", at=at)
            if (stage.rate or 0) * (stage.duration or 0) > MOST_REQUESTS:
                what = "more than 100 million requests in a stage"
                raise invalid(what, "Lower rate or duration.", at="stages")
            for name in other if not closed else ():  # a client sets those of a closed loop while it runs
                if getattr(stage, name) is not None:
                    at = f"stages.{number}.{name}"
                    raise invalid(f"{name} in a stage of a {self.type} load", "Remove it.", at=at)
        if closed and self.sweep is not None:
            raise invalid("a sweep of a concurrent load", "Use stages.", at="sweep")
        if not self.stages and self.sweep is None:
            raise invalid("there are no stages", "List at least one.", at="stages")
        return self

    @property
    def max_concurrency(self) -> int | None:
        """Most requests in flight, None where the number of workers is not known."""
        return None if self.num_workers is None else self.num_workers * self.worker_max_concurrency


class Distribution(Model):
    """Lengths in tokens, see ``InferencePerfLengths``."""

    type: Literal["normal", "skew_normal", "lognormal", "uniform", "poisson", "fixed"] = "normal"
    min: Bounded = 10
    max: Bounded = 1024
    mean: Annotated[Positive, Field(le=1e8)] = 512.0
    std_dev: NonNegative | None = None
    variance: NonNegative | None = None
    skew: float = 0.0
    total_count: Count | None = None  # raised to the largest stage: without effect
    std: NonNegative | None = None  # in files of its first releases, which ignored it

    def lengths(self, generator: Literal["random", "shared_prefix"], each: float) -> InferencePerfLengths:
        """The law, in tokens that the server counts."""
        std_dev = 200.0 if self.std_dev is None else self.std_dev
        if self.variance is not None:
            if self.std_dev:
                raise invalid("std_dev beside variance", "Give one of them.", at="variance")
            std_dev = self.variance**0.5
        return InferencePerfLengths(
            generator=generator,
            type=self.type,
            min=self.min,
            max=self.max,
            mean=self.mean,
            std_dev=std_dev,
            skew=self.skew,
            tokens_each=each,
        )


class SharedPrefixData(Model):
    """Lengths in tokens, as generated: encoding the text again gives others."""

    num_groups: Bounded = 10
    num_prompts_per_group: Bounded = 10
    system_prompt_len: Bounded = 100
    question_len: Bounded | Distribution = 50
    output_len: Bounded | Distribution = 50
    question_distribution: Distribution | None = None
    output_distribution: Distribution | None = None
    enable_multi_turn_chat: Flag = False
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_any_name(cls, data: Any) -> Any:
        _refuse(data, {"multimodal": "multimodal inputs are not modelled"})
        if not isinstance(data, dict):
            return data
        if isinstance(data.get("system_prompt_len"), dict):
            what = "prefixes of different lengths are not modelled"
            raise invalid(what, "Give their mean as a number.", at="system_prompt_len")
        data = {name: value for name, value in data.items() if value is not False}
        for new, old in (
            ("num_unique_system_prompts", "num_groups"),
            ("num_users_per_system_prompt", "num_prompts_per_group"),
        ):
            if new in data:
                if old in data:
                    raise invalid(f"{new} beside {old}", "They are one field: give one of them.", at=new)
                data[old] = data.pop(new)
        return data


class Data(Model):
    """What is sent: the file's ``data``."""

    type: Literal["shared_prefix", "random", "synthetic"]
    shared_prefix: SharedPrefixData | None = None
    input_distribution: Distribution | None = None
    output_distribution: Distribution | None = None
    path: str | None = None
    corpus_file_path: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _modelled(cls, data: Any) -> Any:
        if isinstance(data, dict):
            kind = data.get("type", "mock")
            if isinstance(kind, str) and kind in NOT_MODELLED:
                known = "Known are shared_prefix, random and synthetic."
                raise invalid(f"data.type {kind} is not modelled: {NOT_MODELLED[kind]}", known, at="type")
            _refuse(
                data,
                {
                    "multimodal": "multimodal inputs are not modelled",
                    "trace": "give the file as workload.trace of a scenario instead",
                    "use_chat_template": "the template's tokens are not known; count them into the lengths",
                },
            )
            of_others = ("conversation_replay", "otel_trace_replay", "weka_trace_replay", "visionarena")
            data = {
                name: value for name, value in data.items() if name not in of_others and value is not False
            }
        return data

    @model_validator(mode="after")
    def _complete(self) -> Data:
        if self.type != "shared_prefix":
            for name in ("input_distribution", "output_distribution"):
                if getattr(self, name) is None:
                    raise invalid(f"{name} is missing", f"{self.type} data needs it.", at=name)
        return self


class Api(Model):
    """How it is sent; chat puts a template around each prompt."""

    type: Literal["completion", "chat"] = "completion"
    streaming: Flag = False
    headers: dict[str, str] | None = None
    slo_unit: str | None = None
    slo_tpot_header: str | None = None
    slo_ttft_header: str | None = None
    session_id_header_key: str | None = None
    session_token_header_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _modelled(cls, data: Any) -> Any:
        data = {"type": data} if isinstance(data, str) else data
        _refuse(data, {"response_format": "guided decoding is not modelled"})
        return data


class Server(Model):
    """Where it is sent. Only ``ignore_eos`` says something about the load: outputs have their full length."""

    type: str = "vllm"
    model_name: str | None = None
    base_url: str | None = None
    ignore_eos: Flag = True
    api_key: str | None = None
    cert_path: str | None = None
    key_path: str | None = None

    @model_validator(mode="after")
    def _lengths_are_known(self) -> Server:
        if not self.ignore_eos:
            what = "without ignore_eos the model ends its outputs where it likes"
            fix = "Set it to true, or write the workload as streams with an output length."
            raise invalid(what, fix, at="ignore_eos")
        return self


Block = dict[str, Any] | None


class WorkloadFile(Model):
    """The whole file. ``tokenizer``, ``metrics``, ``report``, ``storage`` and ``circuit_breakers`` say how
    the client works and reports, and are not looked into."""

    data: Data
    load: Load
    api: Api = Api()
    server: Server = Server()
    tokenizer: Block = None
    metrics: Block = None
    report: Block = None
    storage: Block = None
    circuit_breakers: list[Any] | None = None

    @classmethod
    def read(cls, path: Path) -> WorkloadFile:
        """Read a file. What is null in it is as if it were not written.

        Raises:
            InputError: it cannot be read, or has a field that is unknown, wrong or not modelled.
        """
        return parse(cls, _without_nulls(read_yaml(path)), source=str(path))

    def notes(self) -> list[str]:
        """What of it has no effect, and why."""
        of_prompts = self.data.shared_prefix
        lengths = [self.data.input_distribution, self.data.output_distribution]
        if of_prompts is not None:
            lengths += [of_prompts.question_distribution, of_prompts.output_distribution]
        told = {
            "load.base_seed (the scenario has the seed)": self.load.base_seed is not None,
            "data.shared_prefix.seed (the scenario has the seed)": of_prompts is not None
            and of_prompts.seed is not None,
            "load.circuit_breakers (no stage is cut short)": bool(self.load.circuit_breakers),
            "std (inference-perf does not read it: std_dev is 200 unless written)": any(
                each is not None and each.std is not None for each in lengths
            ),
            "data.corpus_file_path (prompts have nothing in common)": self.data.corpus_file_path is not None,
        }
        return [note for note, written in told.items() if written]


def _without_nulls(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _without_nulls(value) for name, value in data.items() if value is not None}
    return [_without_nulls(value) for value in data] if isinstance(data, list) else data
