"""``servecast validate campaign``: measure, fit, predict and judge on one machine, in one go."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType

from servecast.sim.errors import InputError


def campaign(
    plan: str,
    /,
    *,
    out: Path,
    time_budget: float | None = None,
    resume: bool = False,
    again: list[str] | None = None,
    vllm_python: Path | None = None,
    pack: Path | None = None,
    json: bool = False,
) -> int:
    """Run the stages of a plan, in order of value, for as long as there is time.

    Each stage is a servecast command. What ran is in OUT/stages.json at once, and --resume goes on where an
    earlier run was cut off. Exits 0 when all stages are done, 1 when one failed, 3 when some are left.

    Args:
        plan: a shipped plan's name (h200, cpu), or a YAML file.
        out: folder for measurements, profiles, scenarios, predictions, results and logs.
        time_budget: seconds for all stages; packing comes on top.
        resume: go on in a folder, skipping the stages that are done or have failed.
        again: a stage to run once more. Can be repeated.
        vllm_python: Python of an environment with vLLM; the one that runs this without it.
        pack: folder for the whole of OUT as campaign.tar.xz.00, .01, ..., beside stages.json.
        json: print stages.json and nothing else.
    """
    from servecast.calibrate.measure.errors import MeasureError
    from servecast.validate.campaign import MANIFEST, Campaign
    from servecast.validate.campaign_pack import pack as packed
    from servecast.validate.campaign_plan import read_plan

    wanted = read_plan(plan)
    for name in again or []:
        if name not in {stage.name for stage in wanted.stages}:
            raise InputError(f"there is no stage {name!r}", where="--again", fix="Give a name of the plan.")
    running = Campaign(
        wanted,
        out,
        str((vllm_python or Path(sys.executable)).absolute()),
        time_budget,
        resume=resume,
        again=tuple(again or ()),
        say=_say,
    )
    before = signal.signal(signal.SIGTERM, _interrupt)  # so that a time limit set from outside ends it well
    try:
        running.run()
    except MeasureError as error:
        raise InputError(error.what, where=error.where, fix=error.fix) from None
    finally:
        signal.signal(signal.SIGTERM, before)
        if pack is not None and (out / MANIFEST).exists():
            files, left_out = packed(out, pack)
            _say(f"packed {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB into {pack}")
            if left_out:
                _say(f"not packed, for want of room: {', '.join(left_out)}")
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


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
