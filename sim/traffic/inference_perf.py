"""inference-perf's workload file as a workload: kubernetes-sigs/inference-perf, September 2025 and v0.2.0.

Modelled are its ``shared_prefix`` data and its ``constant`` and ``poisson`` loads:

- All groups x prompts are generated once and shuffled once; request n of a stage has prompt n mod their
  number, from 0 in every stage, so that whole prompts come again, question included.
- A stage's first second is a pause. The parent sleeps to the end of the stage, then looks every second
  whether all its requests are done, and waits ``interval`` before the next stage.
- Each worker process has at most ``worker_max_concurrency`` requests in flight and sends late beyond that.
  Their number is that of the client's cores unless ``num_workers`` says it; where it does not, nothing is
  bounded here. The bound is put on all workers together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Count, Flag, InputFile, Model, NonNegative, Positive, invalid, parse
from servecast.sim.inputs.yaml_file import read_yaml
from servecast.sim.traffic.arrivals import InferencePerf
from servecast.sim.traffic.content import SharedPrefix
from servecast.sim.traffic.spec import Polling, StageSpec, StreamSpec, Workload

START_DELAY_S = 1.0  # between a stage's start and the first second that it sends in
POLL_S = 1.0


class LoadStage(Model):
    """int(rate x duration) requests in ``duration`` seconds."""

    rate: Positive
    duration: Count


class Load(Model):
    """When requests are sent: the file's ``load``."""

    type: Literal["constant", "poisson"] = "constant"
    interval: NonNegative = 1.0
    stages: Annotated[tuple[LoadStage, ...], Field(min_length=1)]
    num_workers: Count | None = None
    worker_max_concurrency: Count = 100
    worker_max_tcp_connections: Count = 2500  # a session of its own for each request: without effect

    @property
    def max_concurrency(self) -> int | None:
        """Most requests in flight, None where the number of workers is not known."""
        return None if self.num_workers is None else self.num_workers * self.worker_max_concurrency


class SharedPrefixData(Model):
    """Lengths in tokens, as generated: encoding the text again gives others."""

    num_groups: Count = 10
    num_prompts_per_group: Count = 10
    system_prompt_len: Count = 100
    question_len: Count = 50
    output_len: Count = 50
    enable_multi_turn_chat: Literal[False] = False


class Data(Model):
    """What is sent: the file's ``data``."""

    type: Literal["shared_prefix"]
    shared_prefix: SharedPrefixData = SharedPrefixData()


class Api(Model):
    """How it is sent. The data's prompts are completions; chat would put a template around them."""

    type: Literal["completion"] = "completion"
    streaming: Flag = False
    headers: dict[str, str] | None = None


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

    load: Load
    data: Data
    api: Api = Api()
    server: Server = Server()
    tokenizer: Block = None
    metrics: Block = None
    report: Block = None
    storage: Block = None
    circuit_breakers: list[Any] | None = None

    @classmethod
    def read(cls, path: Path) -> WorkloadFile:
        """Read a file.

        Raises:
            InputError: it cannot be read, or has a field that is unknown, wrong or not modelled.
        """
        return parse(cls, read_yaml(path), source=str(path))


class InferencePerfWorkload(Model):
    """A workload that an inference-perf file describes. Its stages reproduce the rows of a reported table by
    their rate, as ``qps``."""

    inference_perf: InputFile
    """The workload file of inference-perf, loaded as written."""
    prompt_tokens_each: Positive = 1.0
    """Tokens that the server counts for each prompt token of the file, as it encodes the text again."""

    @model_validator(mode="after")
    def _readable(self) -> InferencePerfWorkload:
        try:
            self.workload()
        except InputError as error:
            raise invalid(f"{error.what} ({error.where})", error.fix, at="inference_perf") from None
        return self

    def workload(self) -> Workload:
        """The file's stages. Lengths are rounded to whole tokens.

        Raises:
            InputError: from reading the file.
        """
        file = WorkloadFile.read(self.inference_perf)
        load, data = file.load, file.data.shared_prefix
        stages = []
        for number, stage in enumerate(load.stages):
            stream = StreamSpec(
                arrivals=InferencePerf(
                    kind="inference_perf",
                    request_rate=stage.rate,
                    load=load.type,
                    start_delay_s=START_DELAY_S,
                ),
                duration_s=float(stage.duration),
                max_concurrency=load.max_concurrency,
                prompt_tokens=self._tokens(data.question_len),
                output_tokens=data.output_len,
                content=SharedPrefix(
                    kind="shared_prefix",
                    groups=data.num_groups,
                    prefix_tokens=self._tokens(data.system_prompt_len),
                    prompts_per_group=data.num_prompts_per_group,
                    order="cycle",
                ),
            )
            stages.append(
                StageSpec(
                    streams=(stream,),
                    name=f"stage {number} qps={stage.rate:g}",
                    row={"qps": int(stage.rate) if float(stage.rate).is_integer() else stage.rate},
                    polling=Polling(
                        after_s=START_DELAY_S + stage.duration, every_s=POLL_S, pause_s=load.interval
                    ),
                )
            )
        return Workload(stages=tuple(stages))

    def _tokens(self, generated: int) -> int:
        return max(1, round(generated * self.prompt_tokens_each))
