"""What a client decides before anything is sent."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from registry import wire
from registry.client import Client
from registry.errors import Invalid, Unreachable
from registry.sync_client import Client as SyncClient

NOWHERE = "/nowhere/agent.sock"


@pytest.mark.parametrize("payload", [object(), {1, 2}, math.nan, {"at": b"bytes inside"}])
async def test_payload_that_is_no_json_value_is_invalid(payload: object) -> None:
    client = Client(NOWHERE)
    with pytest.raises(Invalid, match="no JSON value"):
        await client.call("sweeper", "status", payload)
    await client.close()


@pytest.mark.parametrize("payload", [b"x" * (wire.MAX_BODY + 1), "x" * wire.MAX_BODY])
async def test_payload_over_the_limit_is_invalid_before_anything_is_sent(payload: object) -> None:
    client = Client(NOWHERE)
    with pytest.raises(Invalid, match=f"at most {wire.MAX_BODY}"):
        await client.cast("sweeper", "wake", payload)
    await client.close()


async def test_without_an_agent_every_request_is_refused_at_once() -> None:
    client = Client(NOWHERE)
    calls = [client.call("sweeper", "status"), client.call("sweeper", "status"), client.cast("other", "wake")]
    errors = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)
    assert all(isinstance(error, Unreachable) and "PGHERD_AGENT" in error.hint for error in errors)
    with pytest.raises(Unreachable):
        await client.whereis("sweeper")
    await client.close()


async def test_closed_client_refuses() -> None:
    client = Client(NOWHERE)
    await client.close()
    with pytest.raises(Unreachable, match="closed"):
        await client.call("sweeper", "status")


@pytest.mark.parametrize("timeout", [0, -1, 1e-9])
async def test_no_time_is_refused(timeout: float) -> None:
    client = Client(NOWHERE)
    with pytest.raises(Unreachable):
        await client.call("sweeper", "status", timeout=timeout)
    await client.close()


async def test_cancelled_call_leaves_the_client_usable() -> None:
    client = Client(NOWHERE)
    call = asyncio.ensure_future(client.call("sweeper", "status"))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    with pytest.raises(Unreachable):
        await client.call("sweeper", "status")
    await client.close()


@pytest.mark.parametrize("method", ["call", "ask", "cast", "whereis", "names", "methods", "wait", "close"])
def test_sync_client_offers_what_the_other_does(method: str) -> None:
    def parameters(of: type[Any]) -> list[str]:
        code = getattr(of, method).__code__
        return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])

    assert parameters(SyncClient) == parameters(Client)
