"""Finds the ``vllm serve`` in what people paste: shell lines, ``docker run``, Kubernetes ``args``.

Comments, redirections, what follows ``&`` or ``;``, and what stands before the command are left out; the
variables that are set there are kept.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from servecast.sim.inputs.errors import InputError

WHERE = "vllm serve"
_QUOTED = r"\"(?:\\.|[^\"\\])*\"|'[^']*'|\\."
_NO_WORDS = re.compile(rf"({_QUOTED})|(?<!\S)\#[^\n]*|(?<!\S)(?:\d|&)?>{{1,2}}\s*&?[^\s;&|]+")
_VARIABLE = re.compile(r"(?:--env=|-e)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_MODULES = ("vllm.entrypoints.openai.api_server", "vllm.entrypoints.cli.main")
_CONTAINERS = ("docker", "podman", "nerdctl")
_SWITCHES = ("--rm", "--detach", "--interactive", "--tty", "--privileged", "--init", "--read-only", "-P")


@dataclass(frozen=True, slots=True)
class Pasted:
    """What was found.

    Attributes:
        words: the model and the flags, what follows ``vllm serve``.
        variables: those set in front of it, by name.
        release: of vLLM, from the tag of a container image; None if nothing says it.
    """

    words: tuple[str, ...]
    variables: dict[str, str]
    release: str | None = None


def find_serve(command: str | list[Any] | dict[str, Any]) -> Pasted:
    """The server's words in a pasted text, in a list of them, or in a container's ``command`` and ``args``.

    Raises:
        InputError: there is no such command in it, or its quotes do not match.
    """
    if isinstance(command, str):
        listed = _listed(command)
        if listed is None:
            return _in_shell(command)
        command = listed
    if isinstance(command, dict):
        command = [*_words_of(command.get("command")), *_words_of(command.get("args"))]
    words = [str(word) for word in command]
    return _in_segment(words) or Pasted(tuple(words[words[:1] == ["serve"] :]), {})


def _words_of(listed: Any) -> list[str]:
    if isinstance(listed, str):
        return listed.split()
    if listed is None or isinstance(listed, list):
        return [str(word) for word in listed or ()]
    raise InputError(f"{listed!r} is no list of arguments", where=WHERE, fix="Give a list of words.")


def _listed(text: str) -> list[Any] | dict[str, Any] | None:
    """The YAML or JSON list that a text is; None for a shell line."""
    if not re.match(r"\s*(?:- |\[|(?:args|command):)", text):
        return None
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"is no list of arguments ({str(error).splitlines()[0]})", where=WHERE, fix="Check its quotes."
        ) from None
    return found if isinstance(found, list | dict) else None


def _in_shell(text: str) -> Pasted:
    text = _NO_WORDS.sub(lambda match: match[1] or "", text)
    text = re.sub(r"(?<!\S)\\\s+|\\[ \t]*\r?\n\s*", " ", text)  # a continued line, be it folded by YAML
    text = re.sub(r"\n\s*(?=-)", " ", text)  # or without its backslash
    variables: dict[str, str] = {}
    for line in text.splitlines():
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            lexer.whitespace_split, lexer.commenters = True, ""
            words = list(lexer)
        except ValueError as error:
            raise InputError(
                f"cannot be split into words: {error}", where=WHERE, fix="Check the quotes."
            ) from None
        while words:
            end = next((i for i, word in enumerate(words) if re.fullmatch("[;&|]+", word)), len(words))
            found = _in_segment(words[:end])
            if found is not None:
                return Pasted(found.words, variables | found.variables, found.release)
            variables |= _variables(words[:end])
            words = words[end + 1 :]
    fix = "Paste it from 'vllm serve' on."
    raise InputError(f"{text.strip()[:40]!r} is not a vllm serve command", where=WHERE, fix=fix)


def _in_segment(words: list[str]) -> Pasted | None:
    for position, word in enumerate(words):
        before, after = words[:position], words[position + 1 :]
        if word.rpartition("/")[2] in _CONTAINERS and "run" in after:
            return _in_container(before, after[after.index("run") + 1 :])
        if word.rpartition("/")[2] == "vllm" and after[:1] == ["serve"]:
            return Pasted(tuple(after[1:]), _variables(before))
        if word in _MODULES and before[-1:] == ["-m"]:
            return Pasted(tuple(after[after[:1] == ["serve"] :]), _variables(before))
        if word == "-c" and after:  # bash -c "vllm serve ..."
            return _in_shell(after[0])
    return None


def _in_container(before: list[str], words: list[str]) -> Pasted | None:
    """``docker run [options] image [arguments]``: the image is the first word that no option takes."""
    position = 0
    while position < len(words) and words[position].startswith("-"):
        option = words[position]
        position += 1 if "=" in option or option in _SWITCHES or re.fullmatch("-[dit]+", option) else 2
    if position >= len(words):
        return None
    image, after = words[position], words[position + 1 :]
    variables = _variables([*before, *words[:position]])
    tag = re.search(r"vllm[^:]*:v?(\d+\.\d+[.\w]*)", image)
    inside = _in_segment(after)
    if inside is not None:
        return Pasted(inside.words, variables | inside.variables, tag and tag[1])
    return Pasted(tuple(after[after[:1] == ["serve"] :]), variables, tag and tag[1])


def _variables(words: list[str]) -> dict[str, str]:
    found = [_VARIABLE.fullmatch(word) for word in words]
    return {match[1]: match[2] for match in found if match}
