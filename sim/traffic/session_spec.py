"""Sessions in a scenario: turns whose prompts begin with all that was said before."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from servecast.sim.inputs.schema import Amount, Count, Flag, Model, NonNegative, invalid
from servecast.sim.traffic.durations import NO_TIME, Seconds
from servecast.sim.traffic.lengths import Fixed, Lengths

Share = Annotated[NonNegative, Field(le=1)]


class ToolSpec(Model):
    """What an agent does in a turn: requests whose answers are calls of tools, and a last one that
    answers."""

    calls: Lengths
    """Calls of a turn, one after the other."""
    share: Share = 1.0
    """Share of turns that call tools at all."""
    seconds: Seconds = NO_TIME
    """How long a tool takes, from the last token of its call to the next request."""
    result_tokens: Lengths
    """What it adds to the prompt."""
    output_tokens: Lengths | None = None
    """What the model writes to call it. Default, the stream's outputs."""


class SubAgentSpec(Model):
    """Calls that start agents in parallel, whose last answers are its result once all have ended."""

    share: Share
    """Share of tool calls that do."""
    agents: Lengths = Fixed(tokens=1)
    """How many at once."""
    system_prompt_tokens: Amount = 0
    """Leading tokens that all of them have in common."""
    prompt_tokens: Lengths
    """Their task."""
    calls: Lengths = Fixed(tokens=1)
    """Tool calls of each, as those of ``tools``, before it answers."""


class SessionSpec(Model):
    """Each arrival is a session. A turn is sent ``think_s`` after the last token of the answer to the one
    before, and its prompt is all prompts and outputs before, and ``prompt_tokens`` more.

    The prefix cache finds history as vLLM does: full blocks of prompts and of generated tokens.
    """

    turns: Lengths | None = None
    """Turns of a session."""
    users: Count | None = None
    """Instead: arrivals are turns, dealt to so many sessions in order, where they wait for the answer
    before."""
    think_s: Seconds = NO_TIME
    """From an answer to the next turn."""
    context_tokens: Lengths | None = None
    """What only this session has in front of its first turn, such as files."""
    tools: ToolSpec | None = None
    """Tools that turns call."""
    sub_agents: SubAgentSpec | None = None
    """Tools that are agents."""
    max_context_tokens: Count | None = None
    """A session ends before a request that would be longer, output included."""
    prefix_again: Flag = False
    """Each turn brings the prefix of ``content`` again, as inference-perf does since v0.6."""

    @model_validator(mode="after")
    def _complete(self) -> SessionSpec:
        if (self.turns is None) == (self.users is None):
            raise invalid("a session needs one of turns and users", "Give turns, for example 8.")
        if self.sub_agents is not None and self.tools is None:
            raise invalid("sub_agents without tools, whose calls they are", "Add tools.", at="sub_agents")
        if self.users is not None and self.tools is not None:
            raise invalid("tools of turns that arrive by themselves", "Give turns.", at="tools")
        return self
