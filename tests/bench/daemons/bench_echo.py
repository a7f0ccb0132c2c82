"""The daemon that is called: it returns what it gets, and counts what it is told."""

from __future__ import annotations

from node_agent.behaviours import Server, call, cast


class Echo(Server):
    """Echo and counter."""

    async def init(self) -> None:
        self.told = 0

    @call
    async def echo(self, data: bytes) -> bytes:
        """Return the payload."""
        return data

    @cast
    async def tell(self, data: bytes) -> None:
        """Count the payload."""
        self.told += 1

    @call
    async def count(self) -> int:
        """Return how many payloads were told."""
        return self.told
