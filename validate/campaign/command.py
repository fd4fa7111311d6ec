"""``servecast validate campaign``: measure, fit, predict and judge on one machine, in one go."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from servecast.sim.inputs.errors import InputError

OPEN_FILES = 1 << 16


def campaign(
    plan: str,
    /,
    *,
    out: Path,
    time_budget: float | None = None,
    resume: bool = False,
    only: list[str] | None = None,
    again: list[str] | None = None,
    vllm_python: Path | None = None,
    pack: Path | None = None,
    pack_only: bool = False,
    json: bool = False,
) -> int:
    """Run the stages of a plan, in order of value, for as long as there is time.

    Each stage is a servecast command. What ran is in OUT/stages.json at once, and --resume goes on where an
    earlier run was cut off: stages that were never run come first, then those that were cut. Exits 0 when all
    stages are done, 1 when one failed, 3 when some are left.

    Args:
        plan: a shipped plan's name (h200, cpu), or a YAML file.
        out: folder for measurements, profiles, scenarios, predictions, results and logs.
        time_budget: seconds for this command from start to end. 30 of them are kept to end a stage that
            overruns, and with --pack another 30 to pack.
        resume: go on in a folder, skipping the stages that are done or have failed.
        only: a stage to run, and no others. Can be repeated.
        again: a stage to run once more. Can be repeated.
        vllm_python: Python of an environment with vLLM; the one that runs this without it.
        pack: folder for the whole of OUT as campaign.tar.xz.00, .01, ..., beside stages.json.
        pack_only: run nothing, pack what is there. The campaign may be running in another process.
        json: print stages.json and nothing else.
    """
    from servecast.calibrate.measure.folder import Budget

    with _refused():
        budget = Budget(time_budget)

    from servecast.calibrate.ending import sigterm_as_ctrl_c
    from servecast.validate.campaign.campaign import ENDING_S, MANIFEST, Campaign
    from servecast.validate.campaign.pack import PACK_S
    from servecast.validate.campaign.plan import read_plan

    wanted = read_plan(plan)
    for flag, names in (("--only", only or []), ("--again", again or [])):
        for name in names:
            if name not in {stage.name for stage in wanted.stages}:
                raise InputError(f"there is no stage {name!r}", where=flag, fix="Give a name of the plan.")
    if pack_only:
        _pack(out, pack)
        return 0
    _allow_many_connections()
    running = Campaign(
        wanted,
        out,
        str((vllm_python or Path(sys.executable)).absolute()),
        budget,
        ENDING_S + (0 if pack is None else PACK_S),
        resume=resume,
        only=tuple(only or ()),
        again=tuple(again or ()),
        say=_say,
    )
    try:
        with _refused(), sigterm_as_ctrl_c():  # a time limit set from outside ends it well
            running.run()
    finally:
        if pack is not None and (out / MANIFEST).exists():
            _pack(out, pack)
    if json:
        print((out / MANIFEST).read_text(encoding="utf-8"), end="")
    else:
        for row in running.rows.values():
            print(
                f"{row['name']:24} {row['state']:8} {row.get('seconds', 0):6.0f} s  {row.get('reason') or ''}"
            )
        if running.left:
            print(f"not done: {', '.join(running.left)}")
    if any(row["state"] == "failed" for row in running.rows.values()):
        return 1
    return 3 if running.left else 0


def _pack(out: Path, folder: Path | None) -> None:
    from servecast.validate.campaign.campaign import MANIFEST
    from servecast.validate.campaign.pack import pack

    if folder is None:
        raise InputError("nothing says where to", where="--pack-only", fix="Give --pack FOLDER too.")
    if not (out / MANIFEST).exists():
        raise InputError(f"has no {MANIFEST}", where=f"--out {out}", fix="Give the folder of a campaign.")
    files, left_out = pack(out, folder)
    _say(f"packed {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB into {folder}")
    if left_out:
        _say(f"not packed, for want of room or time: {', '.join(left_out)}")


@contextmanager
def _refused() -> Iterator[None]:
    """What a measuring package refuses is refused in servecast's own way."""
    from servecast.calibrate.measure.errors import MeasureError

    try:
        yield
    except MeasureError as error:
        raise InputError(error.what, where=error.where, fix=error.fix) from None


def _allow_many_connections() -> None:
    """Raise the limit on open files: a server and its benchmark, which inherit it, hold one a request."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
        if now != resource.RLIM_INFINITY and now < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
