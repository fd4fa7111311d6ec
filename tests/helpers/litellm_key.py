"""A virtual key of a LiteLLM proxy without a database: LiteLLM asks ``check`` of each request (its
``general_settings.custom_auth``). The check takes its time, as one that asks a distant database would."""

from __future__ import annotations

import asyncio
import os
import secrets

from fastapi import Request
from litellm.proxy._types import ProxyException, UserAPIKeyAuth


async def check(request: Request, api_key: str) -> UserAPIKeyAuth:
    await asyncio.sleep(float(os.environ["KEY_CHECK_S"]))
    if not secrets.compare_digest(api_key, os.environ["VIRTUAL_KEY"]):
        raise ProxyException(message="no such key", type="auth_error", param="api_key", code=401)
    return UserAPIKeyAuth(api_key=api_key, key_alias="a team's", models=["model"])
