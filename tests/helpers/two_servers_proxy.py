"""A proxy in front of a prefill and a decode server, as a process of its own: it sends a completion to the
first with one token and waits for the answer, then sends it to the second and passes on what that streams.

    python two_servers_proxy.py PORT PREFILL_URL DECODE_URL
"""

from __future__ import annotations

import sys

import aiohttp
from aiohttp import web


def application(prefill: str, decode: str) -> web.Application:
    async def complete(request: web.Request) -> web.StreamResponse:
        asked, client = await request.json(), request.app["client"]
        first = {**asked, "max_tokens": 1, "stream": False}
        first.pop("stream_options", None)
        async with client.post(f"{prefill}/v1/completions", json=first) as answer:
            await answer.read()
            answer.raise_for_status()
        async with client.post(f"{decode}/v1/completions", json=asked) as answer:
            passed = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await passed.prepare(request)
            async for chunk in answer.content.iter_any():
                await passed.write(chunk)
            await passed.write_eof()
            return passed

    async def healthy(request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def session(app: web.Application) -> None:
        app["client"] = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600))

    app = web.Application()
    app.on_startup.append(session)
    app.router.add_post("/v1/completions", complete)
    app.router.add_get("/health", healthy)
    return app


if __name__ == "__main__":
    web.run_app(application(*sys.argv[2:4]), host="127.0.0.1", port=int(sys.argv[1]), print=None)
