"""The client for code without an event loop: scripts, cron, notebooks, Django views.

The same methods as :class:`registry.client.Client`, each waiting for its result; one link serves all threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar, Unpack

import uvloop

from registry import client
from registry.client import Answer, Options, Whereabouts
from registry.config import Tls
from registry.v1 import names_pb2

T = TypeVar("T")


class Client:
    """A connected client with an event loop in a thread of its own.  Raises Unreachable."""

    def __init__(self, address: str | None = None, *, tls: Tls | None = None, insecure: bool = False) -> None:
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pgherd client", daemon=True)
        self._thread.start()
        try:
            self._client = self._run(_opened(address, tls, insecure))
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        if not self._loop.is_closed():
            self._run(self._client.close())
            self._stop()

    def call(self, name: str, method: str, payload: Any = None, **options: Unpack[Options]) -> Any:
        return self._run(self._client.call(name, method, payload, **options))

    def ask(self, name: str, method: str, payload: Any = None, **options: Unpack[Options]) -> Answer:
        return self._run(self._client.ask(name, method, payload, **options))

    def cast(self, name: str, method: str, payload: Any = None, **options: Unpack[Options]) -> Answer:
        return self._run(self._client.cast(name, method, payload, **options))

    def whereis(self, name: str, *, linearizable: bool = False) -> Whereabouts:
        return self._run(self._client.whereis(name, linearizable=linearizable))

    def names(self, prefix: str = "") -> tuple[Whereabouts, ...]:
        return self._run(self._client.names(prefix))

    def methods(self, name: str) -> tuple[names_pb2.Method, ...]:
        return self._run(self._client.methods(name))

    def wait(
        self, name: str, state: str = "ready", *, above_epoch: int = 0, timeout: float = 60.0
    ) -> tuple[int, str]:
        return self._run(self._client.wait(name, state, above_epoch=above_epoch, timeout=timeout))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _opened(address: str | None, tls: Tls | None, insecure: bool) -> client.Client:
    return await client.Client(address, tls=tls, insecure=insecure).__aenter__()
