"""``servecast validate``: is the simulator right? Against vLLM's own scheduler, and against live servers."""

from __future__ import annotations

from cyclopts import App

app = App(name="validate", help="Judge the simulator against vLLM itself.")
app.command("servecast.validate.parity.command:parity", name="parity")
app.command("servecast.validate.compare.saved_command:result", name="result")
app.command("servecast.validate.live.command:live", name="live")
app.command("servecast.validate.live.split_command:split", name="split")
