"""inference-perf's workload file as a workload: kubernetes-sigs/inference-perf, v0.2 and later.

Modelled are its ``shared_prefix``, ``random`` and ``synthetic`` data, and its ``constant``, ``poisson`` and
``concurrent`` loads:

- All groups x prompts of ``shared_prefix`` are generated once and shuffled once; request n of a stage has
  prompt n mod their number, from 0 in every stage, so that whole prompts come again, question included. Prompts
  of the others have nothing in common.
- A stage's first second is a pause. The parent sleeps to the end of the stage, then looks every second
  whether all its requests are done, and waits ``interval`` before the next stage. A ``concurrent`` stage sends
  ``num_requests`` in a closed loop of ``concurrency_level``.
- A ``sweep`` makes its stages up to the rate at which a burst saturated the server: simulated, unless given.
- Each worker process has at most ``worker_max_concurrency`` requests in flight and sends late beyond that.
  Their number is that of the client's cores unless ``num_workers`` says it; where it does not, nothing is
  bounded here. The bound is put on all workers together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import (
    Amount,
    Count,
    Flag,
    InputFile,
    Model,
    NonNegative,
    Positive,
    invalid,
    parse,
)
from servecast.sim.inputs.yaml_file import read_yaml
from servecast.sim.traffic.arrivals import ClosedLoop, InferencePerf, Times
from servecast.sim.traffic.content import SharedPrefix, Unique
from servecast.sim.traffic.lengths import Fixed, InferencePerfLengths
from servecast.sim.traffic.spec import Polling, StageSpec, StreamSpec, Workload

START_DELAY_S = 1.0  # between a stage's start and the first second that it sends in
POLL_S = 1.0
BURST_S = 5  # in which a sweep sends its burst
LOOK_S = 0.5  # between its looks at the requests in flight

_NETWORK = "it downloads its prompts"
_TURNS = "conversations whose turns wait for each other are not modelled"
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
    duration: Count | None = None
    num_requests: Count | None = None
    concurrency_level: Count | None = None


class LoadSweep(Model):
    """Stages up to the rate that saturates the server."""

    type: Literal["geometric", "linear"]
    num_requests: Count = 2000  # of the burst that looks for that rate, as is timeout
    timeout: Positive = 60.0
    num_stages: Count = 5
    stage_duration: Count = 180
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
    num_workers: Count | None = None
    worker_max_concurrency: Count = 100
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
    min: Count = 10
    max: Count = 1024
    mean: Positive = 512.0
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

    num_groups: Count = 10
    num_prompts_per_group: Count = 10
    system_prompt_len: Count = 100
    question_len: Count | Distribution = 50
    output_len: Count | Distribution = 50
    question_distribution: Distribution | None = None
    output_distribution: Distribution | None = None
    seed: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _by_any_name(cls, data: Any) -> Any:
        _refuse(data, {"multimodal": "multimodal inputs are not modelled", "enable_multi_turn_chat": _TURNS})
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
            raise invalid(
                "without ignore_eos the model ends its outputs where it likes",
                "Set it to true, or write the workload as streams with an output length.",
                at="ignore_eos",
            )
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


class InferencePerfWorkload(Model):
    """A workload that an inference-perf file describes. Its stages reproduce the rows of a reported table by
    their rate, as ``qps``, or by their ``concurrency``."""

    inference_perf: InputFile
    """The workload file of inference-perf, loaded as written."""
    prompt_tokens_each: Positive = 1.0
    """Tokens that the server counts for each prompt token of the file, as it encodes the text again."""
    chat_template_tokens: Amount | None = None
    """Tokens that the chat template puts around each prompt, where the file's ``api.type`` is ``chat``."""
    saturation_rate: Positive | None = None
    """Requests/s at which the burst of a file's ``sweep`` saturated the server. Default, as simulated."""

    @model_validator(mode="after")
    def _readable(self) -> InferencePerfWorkload:
        try:
            self.workload()
        except InputError as error:
            raise invalid(f"{error.what} ({error.where})", error.fix, at="inference_perf") from None
        return self

    def notes(self) -> tuple[str, ...]:
        """What of the file has no effect here."""
        said = WorkloadFile.read(self.inference_perf).notes()
        return (f"{self.inference_perf.name}: without effect here: {'; '.join(said)}",) if said else ()

    def workload(self) -> Workload:
        """The file's stages; of a sweep without a ``saturation_rate`` its burst. Lengths are rounded to whole
        tokens.

        Raises:
            InputError: from reading the file.
        """
        file = WorkloadFile.read(self.inference_perf)
        stages, stream = file.load.stages, self._stream(file)
        if file.load.sweep is not None:
            if self.saturation_rate is None:
                burst = _stage(-1, file.load.sweep.burst(), stream, file.load)
                return Workload(stages=(burst.model_copy(update={"name": "burst", "row": None}),))
            stages = file.load.sweep.stages(self.saturation_rate)
        return Workload(
            stages=tuple(_stage(number, stage, stream, file.load) for number, stage in enumerate(stages))
        )

    def asks_server(self) -> LoadSweep | None:
        """The sweep whose stages are not known before its burst has been sent, if it is one."""
        return WorkloadFile.read(self.inference_perf).load.sweep if self.saturation_rate is None else None

    def _stream(self, file: WorkloadFile) -> dict[str, Any]:
        """What the streams of all stages have in common."""
        data, each = file.data, self.prompt_tokens_each
        if file.api.type == "chat" and self.chat_template_tokens is None:
            raise InputError(
                "api.type chat puts a template of unknown length around each prompt",
                where=f"{self.inference_perf}: api.type",
                fix="Give it as workload.chat_template_tokens.",
            )
        common: dict[str, Any] = {
            "abort_after_s": file.load.request_timeout,
            "suffix_tokens": self.chat_template_tokens or 0,
        }
        if data.type != "shared_prefix":
            assert data.input_distribution is not None
            assert data.output_distribution is not None
            return common | {
                "prompt_tokens": data.input_distribution.lengths("random", each),
                "output_tokens": data.output_distribution.lengths("random", 1.0),
                "content": Unique(),
            }
        of = data.shared_prefix or SharedPrefixData()
        return common | {
            "prompt_tokens": self._lengths(of.question_len, of.question_distribution, each),
            "output_tokens": self._lengths(of.output_len, of.output_distribution, 1.0),
            "content": SharedPrefix(
                kind="shared_prefix",
                groups=of.num_groups,
                prefix_tokens=_tokens(of.system_prompt_len, each),
                prompts_per_group=of.num_prompts_per_group,
                order="cycle",
            ),
        }

    def _lengths(
        self, length: int | Distribution, older: Distribution | None, each: float
    ) -> Fixed | InferencePerfLengths:
        found = length if older is None else older
        if isinstance(found, int):
            return Fixed(tokens=_tokens(found, each))
        return found.lengths("shared_prefix", each)


def _tokens(generated: int, each: float) -> int:
    return max(1, round(generated * each))


def _stage(number: int, stage: LoadStage, common: dict[str, Any], load: Load) -> StageSpec:
    if load.type == "concurrent":
        assert stage.concurrency_level is not None
        stream = StreamSpec(
            arrivals=ClosedLoop(kind="closed_loop", concurrency=stage.concurrency_level),
            num_requests=stage.num_requests,
            start_s=START_DELAY_S,
            **common,
        )
        row, sends_s = {"concurrency": stage.concurrency_level}, 0
    else:
        assert load.type != "concurrent"
        assert stage.rate is not None
        assert stage.duration is not None
        law = InferencePerf(
            kind="inference_perf", request_rate=stage.rate, load=load.type, start_delay_s=START_DELAY_S
        )
        stream = StreamSpec(
            arrivals=law,
            duration_s=float(stage.duration),
            max_concurrency=load.max_concurrency,
            **common,
        )
        rate = int(stage.rate) if float(stage.rate).is_integer() else stage.rate
        row, sends_s = {"qps": rate}, stage.duration
    name = " ".join(f"{key}={value:g}" for key, value in row.items())
    polling = Polling(after_s=START_DELAY_S + sends_s, every_s=POLL_S, pause_s=load.interval)
    return StageSpec(streams=(stream,), name=f"stage {number} {name}", row=row, polling=polling)
