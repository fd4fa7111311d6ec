"""Writes sim/scenario/vllm_flags.json: the flags of ``vllm serve`` by release, from each one's own parser.

    bash tools/unpack_vllm.sh 0.10.2 0.19.1 0.20 0.21 ...
    python tools/flag_table.py 0.10 0.19 0.20 0.21 ...

A flag stands with what it takes and, where not all releases have it, with the first and the last that do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VLLM = ROOT / ".venv-vllm"
TABLE = ROOT / "sim" / "scenario" / "vllm_flags.json"

# Runs under vLLM's Python. The distribution of a CUDA build says nothing of a device: call it a CPU build.
DUMP = """
import importlib, importlib.metadata, json, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0+cpu" if name == "vllm" else version(name)
import vllm.platforms
for place in ("openai", "launchers", "common"):
    try:
        make = importlib.import_module(f"vllm.entrypoints.{place}.cli_args").make_arg_parser
        break
    except (ImportError, AttributeError):
        pass
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser
kinds = {0: "switch", None: "value", "?": "optional"}
flags, short = {}, {}
for action in make(FlexibleArgumentParser())._actions:
    words = [word[2:] for word in action.option_strings if word.startswith("--")]
    if not words or words[0] == "help":
        continue
    flags[words[0]] = kinds.get(action.nargs, "values")
    short |= {word[1:]: words[0] for word in action.option_strings if not word.startswith("--")}
print("\\n" + json.dumps([flags, short]))
"""


def parser_of(release: str) -> tuple[dict[str, str], dict[str, str]]:
    """The flags of a release with what each takes, and the long forms of short ones."""
    sources = VLLM / f"vllm-{release}"
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    if sources.is_dir():
        environment["PYTHONPATH"] = str(sources)
    run = subprocess.run(
        [VLLM / "bin" / "python", "-c", DUMP], env=environment, capture_output=True, text=True, check=True
    )
    flags, short = json.loads(run.stdout.splitlines()[-1])
    return flags, short


def main(releases: list[str]) -> None:
    parsers = {release: parser_of(release) for release in releases}
    takes: dict[str, list[str]] = {}
    short: dict[str, str] = {}
    for flag in sorted({flag for flags, _ in parsers.values() for flag in flags}):
        kinds = {release: flags[flag] for release, (flags, _) in parsers.items() if flag in flags}
        having = list(kinds)
        first, last = having[0], having[-1]
        assert having == releases[releases.index(first) : releases.index(last) + 1], flag
        assert len(set(kinds.values())) == 1, flag
        since = "" if first == releases[0] else first
        until = "" if last == releases[-1] else last
        takes.setdefault(kinds[first], []).append(f"{flag} {since}-{until}" if since or until else flag)
    for _, words in parsers.values():
        short |= words
    lines = [
        "{",
        f'  "source": "the argument parsers of vllm serve in vLLM {", ".join(releases)}",',
        f'  "releases": {json.dumps(releases)},',
        f'  "short": {_wrapped(json.dumps(dict(sorted(short.items()))))},',
    ]
    lines += [f'  "{kind}": {_wrapped(json.dumps(flags))},' for kind, flags in sorted(takes.items())]
    lines[-1] = lines[-1][:-1]
    TABLE.write_text("\n".join([*lines, "}"]) + "\n")


def _wrapped(text: str) -> str:
    """Broken after commas, at most 110 characters a line."""
    lines = [""]
    for part in text.replace(", ", ",\n").splitlines():
        if len(lines[-1]) + len(part) > 104:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + part
    return "\n    ".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:] or sys.exit(__doc__))
