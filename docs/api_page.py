"""The reference of the Python face, from its docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

import servecast

INTRODUCTION = """# Python

```python
import servecast

scenario = servecast.load("l4-qwen2.5-0.5b")
answer = servecast.simulate(scenario.changed({"engine.max_num_seqs": 16}), request_rate=20)
print(f"{len(answer.requests)} requests, latencies within {answer.error_band:.0%}")
```

```text
1000 requests, latencies within 22%
```

Each question is a function that takes a scenario and returns an answer: print it (`print(answer)` says what
the command says), take its parts, or write it as a page. What is wrong with an input is told by an
`InputError`. The folder `examples/` has scripts and a notebook.
"""
_SECTIONS = ("Args", "Attributes", "Raises")


def page() -> str:
    """The page: the functions, each with its answer, then the other public classes."""
    public = {name: getattr(servecast, name) for name in servecast.__all__}
    functions = {name: each for name, each in public.items() if inspect.isfunction(each)}
    answers = {each: get_type_hints(each)["return"] for each in functions.values()}
    parts = [INTRODUCTION.rstrip()]
    for name, each in functions.items():
        parts.append(f"## {name}\n\n{_signature(f'servecast.{name}', each)}\n\n{_text(each)}")
        if answers[each] not in public.values() and answers[each].__module__.startswith("servecast"):
            parts.append(_class(answers[each], level=3))
    parts += [_class(each, level=2) for each in public.values() if inspect.isclass(each)]
    return "\n\n".join(parts) + "\n"


def _class(cls: type, *, level: int) -> str:
    members = "\n".join(f"- {line}" for line in _members(cls))
    return "\n\n".join(part for part in (f"{'#' * level} {cls.__name__}", _text(cls), members) if part)


def _members(cls: type) -> Iterator[str]:
    """Properties and methods of a class, each with the first sentence on it."""
    for name, member in vars(cls).items():
        what = getattr(member, "__func__", member)
        if name.startswith("_") or not (isinstance(what, property) or inspect.isfunction(what)):
            continue
        text = inspect.getdoc(what)
        if text is None or name.startswith("model_"):
            continue
        call = "" if isinstance(what, property) else "()"
        yield f"`{name}{call}`: {_joined(text.split(chr(10) * 2)[0])}"


def _signature(name: str, function: Any) -> str:
    """The call, an argument a line."""
    lines = []
    keyword_only = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            keyword_only = True
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("*")
            keyword_only = True
        lines.append(str(parameter).replace(f"'{parameter.annotation}'", parameter.annotation))
    inside = "".join(f"    {line},\n" for line in lines)
    answer = inspect.signature(function).return_annotation
    return f"```py\n{name}(\n{inside}) -> {answer}\n```"


def _text(documented: Any) -> str:
    """A docstring as Markdown."""
    text = inspect.getdoc(documented) or ""
    parts = re.split(rf"^({'|'.join(_SECTIONS)}):(.*)$", text, flags=re.MULTILINE)
    found = [_paragraphs(parts[0])]
    for title, rest, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        entries = _entries(body) or [_joined(rest)]
        found.append(f"{title}:\n\n" + "\n".join(f"- {entry}" for entry in entries))
    return "\n\n".join(part for part in found if part)


def _entries(body: str) -> list[str]:
    """The entries of a section, "name: text" each, which go on in lines that are set in."""
    entries = re.split(r"^    (?=\S)", body, flags=re.MULTILINE)[1:]
    return [re.sub(r"^([\w, ]+): ", r"`\1`: ", _joined(entry)) for entry in entries]


def _paragraphs(text: str) -> str:
    return "\n\n".join(_joined(part) for part in text.strip().split("\n\n"))


def _joined(text: str) -> str:
    return re.sub(r"``([^`]*)``", r"`\1`", " ".join(text.split()))
