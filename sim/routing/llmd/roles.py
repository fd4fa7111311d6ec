"""Which role of a disaggregated fleet a filter by label asks for."""

from __future__ import annotations

from collections.abc import Sequence

from servecast.sim.routing.llmd.plugin import Plugin

ROLE = "llm-d.ai/role"  # the label that says what a server of a disaggregated fleet does
_DECODES, _PREFILLS = ("decode", "prefill-decode", "both"), ("prefill", "prefill-decode", "both")
SELECTORS = ("by-label", "by-label-selector", "label-selector-filter")


def roles_of(plugin: Plugin) -> Sequence[str] | None:
    """Those that a filter lets pass; None is all, where it asks for another label."""
    parameters = plugin.parameters
    if plugin.type in ("decode-filter", "prefill-filter"):
        return _DECODES if plugin.type == "decode-filter" else _PREFILLS
    if plugin.type == "by-label":
        values = parameters.texts("validValues")
        return values if parameters.text("label", "") == ROLE else None
    wanted: Sequence[str] | None = None
    labels = parameters.block("matchLabels")
    if (role := labels.text(ROLE, "")) != "":
        wanted = [role]
    for condition in parameters.blocks("matchExpressions"):
        if condition.text("key", "") == ROLE:
            operator, values = condition.text("operator", ""), condition.texts("values")
            known = ("prefill", "decode")
            chosen = {
                "In": values,
                "NotIn": [each for each in known if each not in values],
                "Exists": known,
                "DoesNotExist": (),
            }
            if operator not in chosen:
                what = f"operator is {operator!r}"
                raise condition.error(what, "operator", f"Known are {', '.join(chosen)}.")
            wanted = [each for each in chosen[operator] if wanted is None or each in wanted]
    return wanted
