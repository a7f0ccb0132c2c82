"""What calls are compared with: Erlang's gen_server by global name, and bare gRPC.

Erlang is Debian's ``erlang-base``, two nodes on loopback with an epmd of their own.  Where it is not
installed, eight times the rate of unary grpc.aio calls stands in for it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc

from node_agent.sandbox.process import free_ports

CALLERS = 64
PAYLOAD = b"x" * 100
UNARY_CALLS = 4000
UNARY_WORTH = 8
ERLANG = Path(__file__).with_name("erlang") / "herd_bench.erl"
HOST = "127.0.0.1"

_UNARY, _STREAM = "/echo/Unary", "/echo/Stream"


@dataclass(frozen=True, slots=True)
class Rates:
    """Per second; ``casts`` is None where the reference has none."""

    calls: float
    casts: float | None


class Reference(Protocol):
    """Something that can be measured again and again."""

    name: str

    async def rates(self) -> Rates:
        """Measure once: 64 callers, and one process that casts."""


class Erlang:
    """Two Erlang nodes."""

    name = "Erlang gen_server by global name, 64 callers"

    def __init__(self, callers: asyncio.subprocess.Process) -> None:
        self._callers = callers

    async def rates(self) -> Rates:
        assert self._callers.stdin is not None
        assert self._callers.stdout is not None
        self._callers.stdin.write(b"go\n")
        line = await asyncio.wait_for(self._callers.stdout.readline(), 120)
        calls, casts = (float(word) for word in line.split())
        return Rates(calls, casts)


class Unary:
    """Unary gRPC calls to the echo process."""

    name = f"{UNARY_WORTH} x unary grpc.aio echo, 64 callers"

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._echo: Any = channel.unary_unary(_UNARY)

    async def rates(self) -> Rates:
        async def caller() -> None:
            for _ in range(UNARY_CALLS // CALLERS):
                assert await self._echo(PAYLOAD) == PAYLOAD

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return Rates(UNARY_WORTH * UNARY_CALLS / (time.perf_counter() - began), None)


@asynccontextmanager
async def reference(echo: grpc.aio.Channel) -> AsyncIterator[Reference]:
    """Erlang where it is installed, else unary calls on the channel to the echo process."""
    if shutil.which("erl") is None or shutil.which("erlc") is None:
        yield Unary(echo)
        return
    directory = Path(tempfile.mkdtemp(prefix="pgherd-erlang-"))
    environment = {
        **os.environ,
        "HOME": str(directory),
        "ERL_EPMD_ADDRESS": HOST,
        "ERL_EPMD_PORT": str(free_ports(1)[0]),
        "ERL_CRASH_DUMP_BYTES": "0",
    }
    running: list[asyncio.subprocess.Process] = []

    async def spawn(*argv: str) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=pipe, stdout=pipe, env=environment, cwd=directory
        )
        running.append(process)
        return process

    async def node(name: str, expression: str) -> asyncio.subprocess.Process:
        flags = ["-kernel", "inet_dist_use_interface", "{127,0,0,1}", "-start_epmd", "false"]
        name = f"{name}@{HOST}"
        return await spawn(
            "erl", "-noshell", "-name", name, "-setcookie", "bench", *flags, "-eval", expression
        )

    try:
        compiled = await spawn("erlc", str(ERLANG))
        if await compiled.wait():
            raise RuntimeError(f"{ERLANG} does not compile")
        await spawn("epmd")
        server = await node("server", "herd_bench:serve()")
        assert server.stdout is not None
        await asyncio.wait_for(server.stdout.readline(), 30)
        yield Erlang(await node("callers", f"herd_bench:measure('server@{HOST}')"))
    finally:
        for process in running:
            if process.returncode is None:
                process.kill()
                await process.wait()
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)


@asynccontextmanager
async def bare_grpc() -> AsyncIterator[grpc.aio.Channel]:
    """A process that echoes unary requests and each message of a stream, and a channel to it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.bench.references", stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        port = int(await asyncio.wait_for(process.stdout.readline(), 30))
        async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
            yield channel
    finally:
        process.kill()
        await process.wait()


async def stream_latencies(channel: grpc.aio.Channel, count: int) -> list[float]:
    """Return the seconds of ``count`` echoes on one stream, one after the other, one frame a message."""
    stream: Any = channel.stream_stream(_STREAM)()
    latencies = []
    for _ in range(count):
        began = time.perf_counter()
        await stream.write(PAYLOAD)
        assert await stream.read() == PAYLOAD
        latencies.append(time.perf_counter() - began)
    stream.cancel()
    return latencies


async def _serve() -> None:
    async def unary(request: bytes, context: Any) -> bytes:
        return request

    async def stream(requests: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(message)

    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo", methods),))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_serve())
