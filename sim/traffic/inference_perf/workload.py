"""inference-perf's workload file as a workload: kubernetes-sigs/inference-perf, v0.2 and later.

Modelled are its ``shared_prefix``, ``random`` and ``synthetic`` data, and its ``constant``, ``poisson`` and
``concurrent`` loads:

- All groups x prompts of ``shared_prefix`` are generated once and shuffled once; request n of a stage has
  prompt n mod their number, from 0 in every stage, so that whole prompts come again, question included.
  Prompts of the others have nothing in common.
- With ``enable_multi_turn_chat`` each of those prompts is a user, who waits for the last answer and sends,
  behind all that was said in the stage, prefix and question again (as v0.6 does).
- A stage's first second is a pause. The parent sleeps to the end of the stage, then looks every second
  whether all its requests are done, and waits ``interval`` before the next stage. A ``concurrent`` stage
  sends ``num_requests`` in a closed loop of ``concurrency_level``.
- A ``sweep`` makes its stages up to the rate at which a burst saturated the server: simulated, unless given.
- Each worker process has at most ``worker_max_concurrency`` requests in flight and sends late beyond that.
  Their number is that of the client's cores unless ``num_workers`` says it; where it does not, nothing is
  bounded here. The bound is put on all workers together.
"""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.schema import Amount, InputFile, Model, Positive, invalid
from servecast.sim.traffic.arrivals import ClosedLoop, InferencePerf
from servecast.sim.traffic.content import SharedPrefix, Unique
from servecast.sim.traffic.inference_perf.file import (
    Distribution,
    Load,
    LoadStage,
    LoadSweep,
    SharedPrefixData,
    WorkloadFile,
)
from servecast.sim.traffic.lengths import Fixed, InferencePerfLengths
from servecast.sim.traffic.session_spec import SessionSpec
from servecast.sim.traffic.spec import Polling, Row, StageSpec, StreamSpec, Workload

START_DELAY_S = 1.0  # between a stage's start and the first second that it sends in
POLL_S = 1.0


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
            where, fix = f"{self.inference_perf}: api.type", "Give it as workload.chat_template_tokens."
            raise InputError("api.type chat puts a template of unknown length around each prompt", where, fix)
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
            "sessions": None
            if not of.enable_multi_turn_chat
            else SessionSpec(users=of.num_groups * of.num_prompts_per_group, prefix_again=True),
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
    row: Row
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
