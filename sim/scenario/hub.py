"""The cache of the Hugging Face Hub on this machine, where models that were fetched lie."""

from __future__ import annotations

import os
import re
from pathlib import Path


def hub_folder() -> Path:
    """Where ``huggingface_hub`` keeps what it fetched: HF_HUB_CACHE, or ``hub`` under HF_HOME."""
    given = os.environ.get("HF_HUB_CACHE")
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(given or Path(home) / "hub").expanduser()


def is_hub_id(name: str) -> bool:
    """Whether a name is an id as ``Qwen/Qwen3-32B``, and nothing that lies here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def hub_config(name: str) -> Path | None:
    """The ``config.json`` of a model as ``Qwen/Qwen3-32B``, of the revision that ``main`` is there, or of the
    only one; None where it was not fetched."""
    if not is_hub_id(name):
        return None
    folder = hub_folder() / f"models--{name.replace('/', '--')}"
    main = folder / "refs" / "main"
    revisions = [main.read_text(encoding="utf-8").strip()] if main.is_file() else []
    revisions += sorted(path.name for path in folder.glob("snapshots/*"))
    files = (folder / "snapshots" / each / "config.json" for each in revisions)
    return next((file for file in files if file.is_file()), None)
