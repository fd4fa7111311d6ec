"""The simulator's scheduler decides as vLLM's real one does, step by step; see docs/parity.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cores import MODULES
from places import DATA, REPOSITORY
from trace_scenarios import trace_scenarios

sys.path.append(str(REPOSITORY / "docs"))

import parity_page
from mutations import Mutation, catch, load_mutations
from parity_page import SCENARIOS, ci_scenarios

from servecast.sim.engine.rules import RULES
from servecast.sim.engine.scheduler import Scheduler
from servecast.sim.inputs.errors import InputError
from servecast.validate.parity import command as cli
from servecast.validate.parity.parity import (
    Mismatch,
    ParityResult,
    Recorded,
    compare,
    nearest_rules,
    parity,
    record,
)
from servecast.validate.parity.scenarios import (
    Scenario,
    corner_cases,
    random_scenarios,
    read_scenarios,
)
from servecast.validate.parity.shrink import shrink
from servecast.validate.parity.vllm_process import ENVIRONMENT, VllmProcess

VERSIONS = tuple(SCENARIOS)
MUTATIONS = load_mutations()
needs_vllm = pytest.mark.vllm


def installed(version: str) -> VllmProcess:
    process = VllmProcess.installed(version)
    assert process is not None, f"vLLM {version} is missing from {ENVIRONMENT}"
    return process


@pytest.fixture(scope="module")
def vllm() -> Iterator[dict[str, VllmProcess]]:
    """The oldest and the newest release, and two between them, by release."""
    with ExitStack() as stack:
        yield {version: stack.enter_context(installed(version)) for version in VERSIONS}


@pytest.fixture(scope="module")
def recorded(vllm: dict[str, VllmProcess]) -> dict[str, list[Recorded]]:
    """vLLM's decisions on the set of every test run: asked once, held against many engines."""
    return {version: list(record(vllm[version], ci_scenarios(version))) for version in VERSIONS}


@pytest.fixture(scope="module")
def results(vllm: dict[str, VllmProcess], recorded: dict[str, list[Recorded]]) -> dict[str, ParityResult]:
    return {version: parity(vllm[version].version, recorded[version]) for version in VERSIONS}


@pytest.fixture(scope="module")
def control(vllm: dict[str, VllmProcess]) -> list[Recorded]:
    return parity_page.record_control(vllm["0.32"])


@pytest.fixture(scope="module")
def caught() -> dict[str, Mismatch | None]:
    """Filled by the mutation tests, read by the test of docs/parity.md."""
    return {}


@needs_vllm
@pytest.mark.parametrize("version", VERSIONS)
def test_every_decision_is_vllms(results: dict[str, ParityResult], version: str) -> None:
    result = results[version]
    print(result.counts())
    assert not result.mismatches, str(result.mismatches[0])
    share = SCENARIOS[version] / 150
    assert result.scenarios >= 150 * share
    assert result.steps >= max(10_000, 30_000 * share)
    assert result.preemptions > 500 * share
    assert result.prefix_hit_tokens > 50_000 * share
    assert result.aborts > 200 * share


@needs_vllm
@pytest.mark.parametrize("version", VERSIONS)
def test_scenarios_cover_every_option(recorded: dict[str, list[Recorded]], version: str) -> None:
    configs = [one.scenario.config for one in recorded[version]]
    both_ways = ["enable_prefix_caching", "enable_chunked_prefill", "async_scheduling"]
    both_ways += ["scheduler_reserve_full_isl", "scheduling_policy"]
    for option in both_ways:
        assert len({getattr(config, option) for config in configs}) == 2, option
    share = SCENARIOS[version] / 150
    assert sum(config.long_prefill_token_threshold > 0 for config in configs) > 20 * share
    if version >= "0.32":
        assert sum(config.watermark > 0 for config in configs) > 20 * share
        assert sum(config.long_prefill_token_threshold_adaptive for config in configs) > 20 * share
        assert sum(config.max_num_active_seqs is not None for config in configs) > 10 * share
    if version >= "0.33":
        assert sum(config.prefill_schedule_interval > 1 for config in configs) > 10
    scenarios = [one.scenario for one in recorded[version]]
    requests = [arrival.request for scenario in scenarios for arrival in scenario.arrivals]
    assert any(request.output_tokens < request.max_tokens for request in requests)
    assert any(
        arrival.request.prompt_tokens + arrival.request.output_tokens > scenario.config.max_model_len
        for scenario in scenarios
        for arrival in scenario.arrivals
    )
    assert {abort.in_flight for scenario in scenarios for abort in scenario.aborts} == {True, False}
    answered = {key for one in recorded[version][:5] for event in one.events() for key in event}
    assert {"scheduled", "block_ids", "free_list", "cached_blocks", "waiting", "samples"} <= answered


@needs_vllm
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("trace", ["conversation_trace", "synthetic_trace"])
def test_mooncake_traces(vllm: dict[str, VllmProcess], version: str, trace: str) -> None:
    scenarios = trace_scenarios(DATA / "mooncake" / f"{trace}.jsonl", version, 4, requests=100)
    result = parity(version, record(vllm[version], scenarios))
    assert not result.mismatches, str(result.mismatches[0])
    assert result.scenarios == 4
    assert result.prefix_hit_tokens > 1000


@needs_vllm
def test_rules_of_another_version_differ(
    recorded: dict[str, list[Recorded]], control: list[Recorded]
) -> None:
    counts = parity_page.negative_control(control)
    assert counts["of"] == 25
    assert counts["differ"] >= 20
    assert all(compare(one, "0.32") is None for one in control), "the same recordings, under their own rules"
    others = recorded["0.23"][:25]
    assert sum(compare(one, "0.32") is not None for one in others) >= 20


@needs_vllm
@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.rule for mutation in MUTATIONS])
def test_a_broken_rule_is_caught(
    recorded: dict[str, list[Recorded]], caught: dict[str, Mismatch | None], mutation: Mutation
) -> None:
    caught[mutation.rule] = catch(mutation, recorded[mutation.version])
    assert caught[mutation.rule] is not None, f"nothing sees {mutation.changed_line()}"


@needs_vllm
def test_docs_say_what_was_found(
    results: dict[str, ParityResult], control: list[Recorded], caught: dict[str, Mismatch | None]
) -> None:
    if len(caught) < len(MUTATIONS):
        pytest.skip("only some of the mutations ran")
    text = parity_page.report(
        list(results.values()),
        parity_page.negative_control(control),
        [(mutation, caught[mutation.rule]) for mutation in MUTATIONS],
        parity_page.load_long_run(),
        parity_page.load_ladder(),
    )
    page = (parity_page.DOCS / "parity.md").read_text()
    assert page == text, "run python docs/parity_page.py"


def test_the_engine_cannot_reach_vllm() -> None:
    assert "servecast.sim.engine.scheduler" in sys.modules
    assert not {"vllm", "torch"} & {name.partition(".")[0] for name in sys.modules}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.rule for mutation in MUTATIONS])
def test_a_mutation_is_one_line_of_the_engine(mutation: Mutation) -> None:
    before, after = mutation.changed_line()
    assert before != after
    assert mutation.file in MODULES
    assert mutation.new in mutation.source()


def test_a_mutation_of_a_line_that_is_gone_is_refused() -> None:
    with pytest.raises(LookupError, match="0 times in sim/engine/scheduler"):
        Mutation("a rule", "scheduler", "no such line", "another").scheduler()


def test_mutations_leave_the_engine_alone() -> None:
    broken = MUTATIONS[0].scheduler()
    assert broken is not Scheduler
    assert sys.modules["servecast.sim.engine.scheduler"].Scheduler is Scheduler
    scenario = corner_cases("0.32")[0]
    assert broken(scenario.config).kv is not Scheduler(scenario.config).kv


def test_a_scenario_survives_its_json_form() -> None:
    for scenario in [*random_scenarios("0.32", 3, 20), *corner_cases("0.23")]:
        assert Scenario.from_json(scenario.to_json(), "here") == scenario
    again = list(random_scenarios("0.32", 3, 20))
    assert again == list(random_scenarios("0.32", 3, 20))
    assert again[7] != next(random_scenarios("0.32", 4, 1))


def test_nearest_rules() -> None:
    versions = ("0.19.1", "0.24", "0.31.2", "0.34", "0.40.2", "1.0")
    assert [nearest_rules(version) for version in versions] == ["0.20", "0.24", "0.31", *3 * ["0.33"]]


def test_the_ladder_has_every_release_and_catches_the_wrong_rules() -> None:
    ladder = parity_page.load_ladder()
    assert ladder is not None
    assert list(ladder) == [f"0.{minor}" for minor in range(20, 34)]
    for release, counts in ladder.items():
        assert counts["vllm"].startswith(f"{release}.")
        assert (counts["rules"], counts["mismatches"]) == (release, 0)
        assert counts["scenarios"] >= 60
        assert counts["steps"] >= 10_000
        assert all(count > 0 for count in counts["wrong_rules"].values()), release
        assert len(counts["wrong_rules"]) == 5
    page = (parity_page.DOCS / "parity.md").read_text()
    assert "\n".join(parity_page.ladder_section(ladder)) in page, "run python docs/parity_page.py --ladder"


@needs_vllm
@pytest.mark.parametrize("version", [min(RULES), max(RULES)])
def test_the_wrong_releases_rules_are_caught(recorded: dict[str, list[Recorded]], version: str) -> None:
    caught = parity_page.wrong_rules(version, recorded[version])
    assert len(caught) == 5
    assert min(caught.values()) > 0, caught


@needs_vllm
def test_a_difference_is_shrunk_and_shown(vllm: dict[str, VllmProcess]) -> None:
    broken = next(m for m in MUTATIONS if m.rule == "A preempted request waits at the front")
    make_scheduler = broken.scheduler()

    def difference(scenario: Scenario) -> Mismatch | None:
        return compare(Recorded(scenario, vllm["0.32"].decide(scenario)), "0.32", make_scheduler)

    index, original = next(
        (i, s) for i, s in enumerate(random_scenarios("0.32", 0, 50)) if difference(s) is not None
    )
    smallest = shrink("0.32", 0, index, lambda scenario: difference(scenario) is not None, tries=100)
    found = difference(smallest)
    assert compare(Recorded(smallest, vllm["0.32"].decide(smallest)), "0.32") is None
    assert found is not None
    assert len(smallest.arrivals) <= len(original.arrivals) / 2
    shown = str(found)
    assert shown.startswith("random-0.32-0-")
    assert "! waiting" in shown
    assert "vLLM [" in shown
    assert "ours [" in shown


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@needs_vllm
def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.parity(vllm="0.23", scenarios=8, seed=5, json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["vllm"] == "0.23.0"
    assert (printed["scenarios"], printed["mismatches"], printed["seed"]) == (8, 0, 5)
    assert printed["steps"] > 500
    assert {"preemptions", "prefix_hit_tokens"} <= printed.keys()


@needs_vllm
def test_command_on_a_difference(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(RULES, "0.32", RULES["0.23"])
        assert cli.parity(vllm="0.32", scenarios=3) == 1
        assert "Replay: servecast validate parity" in capsys.readouterr().out
        files = sorted(Path("out/parity").glob("*-shrunk.json"))
        assert len(files) == 1
        assert cli.parity(vllm="0.32", replay=files[0]) == 1


@needs_vllm
def test_command_without_a_rule_set(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for release in ("0.24", "0.25", "0.26", "0.27", "0.28", "0.29", "0.30", "0.31", "0.32", "0.33"):
        monkeypatch.delitem(RULES, release)
    python = ENVIRONMENT / "bin" / "python"
    assert cli.parity(vllm_python=python, scenarios=4, json=True) == 3
    printed = json.loads(capsys.readouterr().out)
    assert printed["rule_set_known"] is False
    assert printed["differences"]
    assert "There are no rules for vLLM 0.32.0" in printed["notes"][0]


def test_command_for_an_unknown_version_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.parity(vllm="0.99", json=True) == 3
    assert "and it is not installed" in json.loads(capsys.readouterr().out)["notes"][0]


@needs_vllm
def test_command_with_the_wrong_version() -> None:
    with pytest.raises(InputError, match=r"has vLLM 0\.32\.0, not 0\.23"):
        cli.parity(vllm="0.23", vllm_python=ENVIRONMENT / "bin" / "python")


@pytest.mark.parametrize(
    ("python", "message"),
    [(Path("/no/such/python"), "cannot start"), (Path(sys.executable), "ended with code 1: .*vllm")],
)
def test_command_without_vllm(python: Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cli.parity(vllm_python=python)


@pytest.mark.parametrize("text", ["not json", "{}", '{"name": "a", "config": {"colour": 1}}'])
def test_command_on_a_file_that_is_no_scenario(in_folder: Path, text: str) -> None:
    Path("s.json").write_text(text)
    with pytest.raises(InputError, match=r"s\.json:1: not a parity scenario"):
        read_scenarios(Path("s.json"))
    with pytest.raises(InputError, match="No such file"):
        read_scenarios(Path("other.json"))


def test_command_with_no_scenarios() -> None:
    with pytest.raises(InputError, match="--scenarios"):
        cli.parity(scenarios=0)
