"""Several connectors as one (vLLM's MultiConnector): the first that has something loads it, all store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Several
from typing import Any

from servecast.sim.engine.connector import Connector, Ending, FailurePolicy, Role, Transfers
from servecast.sim.engine.sequence import Sequence
from servecast.sim.engine.step import Step


class MultiConnector:
    """See ``Connector``.

    Args:
        connectors: in their order. role, load_failure_policy: its own.
    """

    def __init__(
        self, connectors: Several[Connector], role: Role, load_failure_policy: FailurePolicy
    ) -> None:
        self.connectors, self.role, self.load_failure_policy = tuple(connectors), role, load_failure_policy
        self._clocked: list[Any] = [each for each in self.connectors if hasattr(each, "now")]
        self._loads: dict[int, Connector] = {}  # request -> who was found to have something for it
        self._keeps: Counter[int] = Counter()  # request -> who still needs its blocks, beyond one
        self._reports: dict[int, list[Transfers | None]] = {}  # on their way to the scheduler
        self._now = self._reported = 0

    @property
    def requires_kv_delivery(self) -> bool:
        """Where one of them does."""
        return any(each.requires_kv_delivery for each in self.connectors)

    @property
    def now(self) -> int:
        """The time of the scheduler's calls, ps."""
        return self._now

    @now.setter
    def now(self, time: int) -> None:
        self._now = time
        for each in self._clocked:
            each.now = time

    def bind(self, scheduler: Any) -> None:
        for each in self.connectors:
            each.bind(scheduler)

    def on_new_request(self, sequence: Sequence) -> None:
        for each in self.connectors:
            each.on_new_request(sequence)

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int, bool] | None:
        found = (0, False)
        for each in self.connectors:
            answer = each.get_num_new_matched_tokens(sequence, num_computed_tokens)
            if answer is None:
                return None
            if not found[0] and answer[0]:
                found, self._loads[sequence.request_id] = answer, each
        return found

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        chosen = self._loads.get(sequence.request_id)
        for each in self.connectors:
            each.update_state_after_alloc(sequence, num_external_tokens if each is chosen else 0)

    def build_connector_meta(self, step: Step) -> list[Any]:
        return [each.build_connector_meta(step) for each in self.connectors]

    def request_finished(self, sequence: Sequence, ending: Ending) -> bool:
        kept = sum(each.request_finished(sequence, ending) for each in self.connectors)
        self._loads.pop(sequence.request_id, None)
        if kept > 1:
            self._keeps[sequence.request_id] = kept - 1
        return kept > 0

    def update_connector_output(self, transfers: Transfers) -> None:
        for report in transfers.jobs:
            for each, its in zip(self.connectors, self._reports.pop(report), strict=True):
                if its is not None:
                    each.update_connector_output(its)

    def start_load_kv(self, meta: list[Any], now: int) -> float:
        return sum(each.start_load_kv(work, now) for each, work in zip(self.connectors, meta, strict=True))

    def wait_for_save(self, meta: list[Any], now: int) -> float:
        saved = 0.0
        for each, work in zip(self.connectors, meta, strict=True):
            if (saves := getattr(each, "wait_for_save", None)) is not None:
                saved += saves(work, now)
        return saved

    def get_finished(self, now: int) -> Transfers | None:
        each_of = [each.get_finished(now) for each in self.connectors]
        reports = [report for report in each_of if report is not None]
        if not reports:
            return None
        sent: list[int] = []
        for request_id in (request_id for report in reports for request_id in report.finished_sending):
            if self._keeps[request_id]:
                self._keeps[request_id] -= 1
            else:
                del self._keeps[request_id]
                sent.append(request_id)
        self._reported += 1
        self._reports[self._reported] = each_of
        return Transfers(
            tuple(request_id for report in reports for request_id in report.finished_recving),
            tuple(sent),
            frozenset().union(*(report.invalid_block_ids for report in reports)),
            tuple(request_id for report in reports for request_id in report.failed_recving),
            (self._reported,),
        )

    def next_event(self, now: int) -> int:
        return min(each.next_event(now) for each in self.connectors)
