"""A TCP proxy that can cut, hold up or delay what passes through it; one thread for all of them."""

from __future__ import annotations

import asyncio
import enum
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class Mode(enum.Enum):
    """What becomes of the traffic.

    PASS it on; CUT: connections are reset and new ones too; DEAF: nothing passes in either direction, and
    nobody is told.
    """

    PASS = "pass"
    CUT = "cut"
    DEAF = "deaf"


class Proxy:
    """Passes connections on to ``target`` (host, port); ``address`` is where it listens."""

    def __init__(self, target: tuple[str, int], port: int) -> None:
        self.target, self.port = target, port
        self.mode = Mode.PASS
        self.delay = 0.0
        self._pass = asyncio.Event()
        self._pass.set()
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)

    def close(self) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
        self.set(Mode.CUT, 0.0)

    def set(self, mode: Mode, delay: float) -> None:
        self.mode, self.delay = mode, delay
        (self._pass.clear if mode is Mode.DEAF else self._pass.set)()
        if mode is Mode.CUT:
            for connection in self._connections:
                connection.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        onward: asyncio.StreamWriter | None = None
        try:
            if self.mode is Mode.CUT:
                return
            await self._pass.wait()
            answers, onward = await asyncio.open_connection(*self.target)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(reader, onward))
                tasks.create_task(self._pump(answers, writer))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            for end in (writer, onward):
                if end is not None:
                    end.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on what comes, each piece ``delay`` seconds later, however many are on their way."""
        now = asyncio.get_running_loop().time
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, data = await under_way.get()
                await asyncio.sleep(max(due - now(), 0.0))
                await self._pass.wait()
                writer.write(data)
                await writer.drain()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(deliver())
            while data := await reader.read(1 << 16):
                under_way.put_nowait((now() + self.delay, data))
            raise ConnectionResetError


class Proxies:
    """The thread they live in, from :meth:`start` to :meth:`stop`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._all: list[Proxy] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._thread.start()

    def add(self, target: tuple[str, int], port: int) -> Proxy:
        """Listen at ``port`` for connections to ``target``."""

        async def make() -> Proxy:
            proxy = Proxy(target, port)
            await proxy.listen()
            self._all.append(proxy)
            return proxy

        return self._run(make())

    def set(self, proxies: list[Proxy], mode: Mode = Mode.PASS, delay: float = 0.0) -> None:
        """Change what these do, from the next byte on."""

        async def change() -> None:
            for proxy in proxies:
                proxy.set(mode, delay)

        self._run(change())

    def stop(self) -> None:
        async def end() -> None:
            for proxy in self._all:
                proxy.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)
