"""How the workers of this host are: each runtime is asked, and answers beside whatever its handler does.

Asked for only when somebody wants to know, so a daemon that is well costs nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from node_agent.attachment import Attachment
from registry.clock import Clock
from registry.errors import HerdError
from registry.v1 import messages_pb2

WITHIN = 0.5
"""Seconds a runtime has to answer."""

HANGS_AFTER = 5.0
"""Seconds of one handler that are a problem."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """What a runtime said; ``answered``: it did.  ``handling`` is the method that runs, for ``seconds``."""

    answered: bool = True
    handling: str = ""
    seconds: float = 0.0
    queued: int = 0

    @property
    def is_problem(self) -> bool:
        """Return whether somebody should look at it."""
        return not self.answered or self.seconds > HANGS_AFTER

    def describe(self) -> str:
        """Return one sentence without a subject's name; empty for a daemon that waits for messages."""
        if not self.answered:
            return f"its process does not answer a ping within {WITHIN:g} s"
        wait = f"{self.queued} message{'' if self.queued == 1 else 's'} wait{'s' if self.queued == 1 else ''}"
        if self.handling:
            return f"its handler `{self.handling}` runs for {self.seconds:.1f} s, {wait}"
        return wait if self.queued else ""


async def feel(attached: Mapping[str, Attachment], clock: Clock) -> dict[str, Pulse]:
    """Ask every runtime at once; one whose connection ended meanwhile is left out.  Ends after ``WITHIN``."""
    asked: dict[str, asyncio.Future[messages_pb2.Frame]] = {}
    for key, attachment in attached.items():
        answer: asyncio.Future[messages_pb2.Frame] = asyncio.get_running_loop().create_future()
        frame = messages_pb2.Frame(kind=messages_pb2.KIND_SYSTEM, to=key, method="ping")
        try:
            attachment.send(frame, clock.now() + WITHIN, partial(_answered, answer))
        except HerdError:
            # Not connected any more, or so full that not even this gets through.
            if attachment.closed:
                continue
            answer.set_result(messages_pb2.Frame(error=messages_pb2.Error()))
        asked[key] = answer
    await asyncio.gather(*asked.values())
    return {key: _read(answer.result()) for key, answer in asked.items() if not attached[key].closed}


def _answered(answer: asyncio.Future[messages_pb2.Frame], said: messages_pb2.Frame) -> None:
    # Who asked may have been cancelled.
    if not answer.done():
        answer.set_result(said)


def _read(answer: messages_pb2.Frame) -> Pulse:
    if answer.HasField("error"):
        return Pulse(answered=False)
    said = json.loads(answer.json)
    return Pulse(True, said["handling"] or "", said["handling_seconds"] or 0.0, said["queued"])
