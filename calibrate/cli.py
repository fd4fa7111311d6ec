"""``servecast calibrate``: measurements or reports in, a profile out."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from servecast.calibrate.fit import plot as fit_plot
from servecast.calibrate.fit.endpoint import endpoint
from servecast.calibrate.fit.folder import fit_folder
from servecast.calibrate.fit.layer_tables import is_layer_folder
from servecast.calibrate.fit.layers import fit_layers
from servecast.calibrate.fit.report import fit_report
from servecast.calibrate.fit.text import cell_line, constants_lines, profile_lines
from servecast.calibrate.measure.folder import say
from servecast.calibrate.measure.vllm.ending import heeds_ctrl_c, signal_group, sigterm_as_ctrl_c, start
from servecast.scenarios.make.kernels.tables import fit_kernel_tables
from servecast.sim.hardware.gpu import GPU, find_gpu
from servecast.sim.hardware.gpu_constants import GpuConstants
from servecast.sim.hardware.profile import Profile
from servecast.sim.inputs.errors import InputError
from servecast.sim.inputs.files import write_whole
from servecast.sim.inputs.schema import did_you_mean
from servecast.sim.scenario.basis import constants_of
from servecast.sim.scenario.scenario import load, shipped_folder

app = App(name="calibrate", help="Measure a machine, fit a profile, or show what one says and where it ends.")
app.command(endpoint)


@app.command(help_flags=())
def measure(
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)], python: Path | None = None
) -> int:
    """Measure the machine at hand into a folder: measure engine --model FOLDER --out DIR.

    The same as ``python -m measure`` beside a copy of the folder calibrate/measure on a machine without
    servecast; ``measure engine --help`` lists the flags, and those that it does not know go to vLLM.

    Args:
        arguments: what to measure, and its flags.
        python: of the environment that has vllm and torch; the one that runs this without it.
    """
    python = python or Path(sys.executable)
    path = [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")]
    process = start(  # in a group of its own, so that a Ctrl-C reaches it once, from us
        [str(python), "-m", "measure", *(arguments or ("--help",))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        preexec_fn=heeds_ctrl_c,  # also where a shell started us in the background, without one
    )
    try:
        with sigterm_as_ctrl_c():
            return process.wait()
    except KeyboardInterrupt:
        signal_group(process.pid, signal.SIGINT)  # it, and the benchmark that it may be waiting for
        process.wait()
        raise


@app.command
def fit(
    source: str,
    *,
    output: Path,
    from_report: Annotated[bool, Parameter(negative=())] = False,
    kernel_tables: Annotated[bool, Parameter(negative=())] = False,
    kind: Literal["physical", "grid", "layers"] = "physical",
    scenario: str | None = None,
    gpu: str | None = None,
    even_bad: Annotated[bool, Parameter(negative=())] = False,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Fit a profile to a folder of measurements, or to the reported rows that a scenario names for it.

    A bad fit is not written: the reasons are printed, and the exit code is 1.

    Args:
        source: a folder that calibrate measure wrote, or one of layer timing tables (dense.csv,
            attention.csv, ...); with --from-report a scenario, a shipped one's name or a YAML file with
            reported.0.fit_rows.
        output: where the profile is written. Peaks that no datasheet gave go beside it, into NAME.gpu.json.
        from_report: fit to the scenario's reported table, through the simulator. Takes a few minutes.
        kernel_tables: fit the constants of --gpu to NVIDIA's timings of vLLM's kernels: source is a folder
            with an unpacked wheel of aiconfigurator-core.
        kind: physical for efficiencies, which carry over to other models and GPUs; grid for the measured
            steps themselves, interpolated; layers for layer timing tables, put together into steps.
        scenario: for layer timing tables: names the model and the GPU that they are of.
        gpu: the machine's, where its own name is not in the catalogue: a name, or a file that describes it.
        even_bad: of a folder that calibrate measure wrote, write a bad fit too. The profile has the reasons,
            and the exit code stays 1.
        json_: print what was found as JSON.
    """
    if from_report:
        return _fit_report(source, output, json_=json_)
    if kernel_tables:
        return _fit_kernel_tables(source, gpu, output, json_=json_)
    if is_layer_folder(Path(source)):
        return _fit_layers(Path(source), scenario, kind, output, json_=json_)
    if kind == "layers":
        fix = "Give a folder with dense.csv, per_sequence.csv and attention.csv, or another kind."
        raise InputError("there are no layer timing tables", where=source, fix=fix)
    return _fit_measurements(source, kind, gpu, output, even_bad=even_bad, json_=json_)


def _fit_measurements(
    folder: str,
    kind: Literal["physical", "grid"],
    gpu: str | None,
    output: Path,
    *,
    even_bad: bool,
    json_: bool,
) -> int:
    own = None if gpu is None else (GPU.from_file(gpu) if Path(gpu).suffix else find_gpu(gpu, where="--gpu"))
    found = fit_folder(folder, kind=kind, gpu=own, progress=say)
    if json_ and not found.good:
        say(f"a bad fit: {'; '.join(found.summary.reasons)}")
    peaks = found.gpu if found.derived else None
    return _keep(found.profile, output, "these measurements", json_=json_, even_bad=even_bad, peaks=peaks)


def _fit_layers(folder: Path, scenario: str | None, kind: str, output: Path, *, json_: bool) -> int:
    if scenario is None:
        raise InputError(
            "nothing says which model and GPU the layer timing tables are of",
            where="--scenario",
            fix="Name a scenario of that model and GPU.",
        )
    if kind == "grid":
        raise InputError(
            "layer timing tables hold no steps for a grid", where="--kind", fix="Use physical or layers."
        )
    profile = fit_layers(folder, load(scenario), kind="layers" if kind == "layers" else "physical")
    return _keep(profile, output, "the tables", json_=json_)


def _keep(
    profile: Profile,
    output: Path,
    what: str,
    *,
    json_: bool,
    even_bad: bool = False,
    peaks: GPU | None = None,
) -> int:
    """Save a profile whose fit to ``what`` is good, with the peaks that were measured for it, and tell."""
    good = profile.fit is None or not profile.fit.reasons
    written = good or even_bad
    files: dict[str, Path | None] = {"profile": output if written else None, "gpu": None}
    if written:
        profile.save(output)
        if peaks is not None:
            files["gpu"] = beside = output.with_suffix(".gpu.json")
            peaks.save(beside)
    if json_:
        fit = None if profile.fit is None else profile.fit.model_dump(mode="json", exclude={"shown"})
        paths = {name: file and str(file) for name, file in files.items()}
        print(json.dumps({"good": good, **paths, "fit": fit}))
        return 0 if good else 1
    print(*profile_lines(profile), sep="\n")
    if not good:
        print(f"{'a bad fit' if written else 'nothing written'}: the model does not describe {what}")
    if written:
        print(f"profile written to {output}")
    if files["gpu"] is not None:
        print(f"measured peaks written to {files['gpu']}: name it as gpu.file in scenarios")
    return 0 if good else 1


def _fit_kernel_tables(source: str, gpu: str | None, output: Path, *, json_: bool) -> int:
    if gpu is None:
        raise InputError("no GPU is named", where="--gpu", fix="Name the GPU whose tables are read, as h200.")
    found = fit_kernel_tables(source, find_gpu(gpu, where="--gpu"))
    write_whole(output, lambda partial: partial.write_text(found.model_dump_json(indent=1) + "\n"))
    if json_:
        print(found.model_dump_json())
        return 0
    print(*constants_lines(found), sep="\n")
    print(f"constants written to {output}")
    return 0


def _fit_report(source: str, output: Path, *, json_: bool) -> int:
    found = fit_report(load(source), progress=say, jobs=-1)
    found.profile.save(output)
    if json_:
        print(json.dumps({"profile": str(output), "rows": [cell.to_json() for cell in found.cells]}))
        return 0
    for cell in found.cells:
        print(cell_line(" ".join(f"{key}={value}" for key, value in cell.keys.items()), cell))
    print(f"profile written to {output}")
    return 0


@app.command
def show(
    profile: str,
    *,
    plot: Path | None = None,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> None:
    """Print what a profile says: parameters with their origin, domain, error band, and how its fit did.

    Args:
        profile: a profile's JSON file, or a shipped one's name; or a GPU's name, for the constants that a
            scenario without a profile rests on.
        plot: draw it into this .svg or .html: measured against fitted, where it keeps measured steps, or its
            own steps, and the roofline.
        json_: print it as JSON.
    """
    loaded = _named(profile)
    if isinstance(loaded, GpuConstants):
        if plot is not None:
            raise InputError(
                "constants of kernels have no steps", where="--plot", fix="Leave it out, or name a profile."
            )
        print(loaded.model_dump_json(indent=2) if json_ else "\n".join(constants_lines(loaded)))
        return
    if plot is not None:
        fit_plot.plot(loaded, plot)
    if json_:
        print(loaded.model_dump_json(indent=2))
        return
    print(*profile_lines(loaded), sep="\n")
    if plot is not None:
        print(f"plot written to {plot}")


def _named(name: str) -> Profile | GpuConstants:
    """A profile by its file or its name, or a GPU's constants by its name or their file."""
    path = Path(name)
    if path.suffix != ".json" and not path.is_file():
        shipped = {each.stem: each for each in (shipped_folder() / "profiles").glob("*.json")}
        if name.lower() not in shipped:
            try:
                return constants_of(find_gpu(name, where="PROFILE"))
            except InputError as error:
                known = f"Shipped are {', '.join(sorted(shipped))}; or name a GPU."
                fix = did_you_mean(name, shipped) or known
                raise InputError(f"there is no profile {name!r}", where="PROFILE", fix=fix) from error
        path = shipped[name.lower()]
    return GpuConstants.load(path) if GpuConstants.are_in(path) else Profile.load(path)
