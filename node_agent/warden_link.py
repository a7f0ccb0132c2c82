"""The agent's end of its talk with the warden.

One per agent process.  Everything is called in the agent's loop, except :meth:`WardenLink.raise_deadline`,
which the session calls in its own thread: a packet of the socket is atomic, so the two never mix.  When the
socket ends the warden is dead, the lease it held with it, and this process exits at once, without any
cleaning up.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from node_agent.warden import protocol

HANDOVER_WITHIN = 10.0
EXIT_WARDEN_LOST = 70
_PACKETS_A_TURN = 64
_FULL_SOCKET_WAIT_MS = 250
_FOLLOW_PARTS = 64
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """What the warden knew when this agent came."""

    generation: int
    containment: protocol.Containment
    warden: str
    launcher_pid: int
    warden_pid: int
    agent_pid: int
    remembered: Mapping[str, Any]
    leases: Mapping[int, float]
    """Hard deadlines of the leases that have not passed."""
    workers: tuple[protocol.WorkerRow, ...]
    starts: Mapping[tuple[str, int], int]
    """Processes counted by (name or child, epoch)."""


@dataclass(frozen=True, slots=True)
class Tail:
    """A piece of a child's output; ``dropped`` bytes just before it are lost."""

    data: bytes
    dropped: int


class _Follower:
    def __init__(self) -> None:
        self.pieces: asyncio.Queue[Tail] = asyncio.Queue(maxsize=_FOLLOW_PARTS)
        self._dropped = 0

    def take(self, part: protocol.OutputPart) -> None:
        self._dropped += part.dropped
        if self.pieces.full():
            self._dropped += len(part.data)
        else:
            self.pieces.put_nowait(Tail(part.data, self._dropped))
            self._dropped = 0


def _die() -> None:
    os._exit(EXIT_WARDEN_LOST)


class WardenLink:
    """See the module.  Made by :meth:`open` only."""

    welcome: Welcome

    def __init__(self, fd: int, lost: Callable[[], object]) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._lost = lost
        self._unsent: deque[bytes] = deque()
        self._starts: dict[str, asyncio.Future[protocol.Started | protocol.StartFailed]] = {}
        self._outputs: dict[int, tuple[bytearray, asyncio.Future[Tail]]] = {}
        self._requests = 0
        self._followers: dict[str, list[_Follower]] = {}
        self._happenings: asyncio.Queue[protocol.Exited | protocol.Gone] = asyncio.Queue()
        self._orders: asyncio.Queue[protocol.Stop | protocol.Reload] = asyncio.Queue()
        self._handover: list[protocol.FromWarden] | None = []
        self._handed_over: asyncio.Future[None] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._ending = False
        self._hang_limit = 0.0

    @classmethod
    async def open(
        cls, fd: int, *, hang_limit: float = 5.0, stop_within: float = 30.0, lost: Callable[[], object] = _die
    ) -> WardenLink:
        """Greet the warden over the inherited ``fd`` and take over what it kept.

        The warden kills this process when :meth:`pet` is not called for ``hang_limit`` seconds, and ends
        everything ``stop_within`` seconds after it passed on a :class:`~node_agent.warden.protocol.Stop`.
        ``lost`` is called when the warden is gone.  Raises TimeoutError if nobody answers.
        """
        link = cls(fd, lost)
        link._hang_limit = hang_limit
        link._loop.add_reader(link._socket.fileno(), link._readable)
        link._send(protocol.Hello(hang_limit=hang_limit, stop_within=stop_within))
        async with asyncio.timeout(HANDOVER_WITHIN):
            await link._handed_over
        return link

    def close(self) -> None:
        """Hang up: nothing is sent or heard any more.  The warden replaces an agent that does this."""
        self._stop_listening()
        self._ending = True
        self._socket.close()

    # Requests.

    def raise_deadline(self, lease: int, deadline: float) -> bool:
        """Let workers of ``lease`` live until ``deadline`` (CLOCK_BOOTTIME); any thread may call this.

        False: the warden did not take it in time, and the deadline stays as it was.
        """
        packet = protocol.encode(protocol.RaiseDeadline(lease=lease, deadline=deadline))
        try:
            self._socket.send(packet)
        except BlockingIOError:
            writable = select.poll()
            writable.register(self._socket, select.POLLOUT)
            if not writable.poll(_FULL_SOCKET_WAIT_MS):
                return False
            return self._send_again(packet)
        except OSError:
            return False
        return True

    def _send_again(self, packet: bytes) -> bool:
        try:
            self._socket.send(packet)
        except OSError:
            return False
        return True

    def forget_lease(self, lease: int) -> None:
        """End ``lease`` now: what still runs under it is killed, and it is never accepted again."""
        self._send(protocol.Forget(lease=lease))

    def remember(self, key: str, value: Any) -> None:
        """Keep a JSON value for the next agent; None removes it.

        Raises :class:`~node_agent.warden.protocol.ProtocolError` if it is too large or not JSON.
        """
        self._send(protocol.Remember(key=key, value=value))

    def pet(self) -> None:
        """Tell the warden that the loop turns; for the loop that does the work, nothing else."""
        self._send(protocol.Pet())

    async def keep_petting(self) -> None:
        """Pet as often as the hang limit needs, for ever."""
        while True:
            self.pet()
            await asyncio.sleep(self._hang_limit / 5)

    async def start(self, start: protocol.Start) -> protocol.Started | protocol.StartFailed:
        """Start a process; returns once it runs, or once nothing of it is left.

        Cancelled while it waits, it has the process killed.
        """
        answer: asyncio.Future[protocol.Started | protocol.StartFailed] = self._loop.create_future()
        self._starts[start.worker] = answer
        try:
            self._send(start)
            return await answer
        except protocol.ProtocolError as why:
            return protocol.StartFailed(
                worker=start.worker, why=str(why), refused=True, counted=start.start - 1
            )
        finally:
            del self._starts[start.worker]
            if answer.cancelled():
                self.kill(start.worker)

    def signal(self, worker: str, signum: int, group: bool = False) -> None:
        """Send a signal to the main process, or to its whole process group; nothing if it has ended."""
        self._send(protocol.Signal(worker=worker, signum=signum, group=group))

    def kill(self, worker: str) -> None:
        """SIGKILL everything that belongs to ``worker``; Exited and Gone follow."""
        self._send(protocol.Kill(worker=worker))

    def drop(self, child: str) -> None:
        """Forget output, last end and count of starts of a child that is not wanted any more."""
        self._send(protocol.Drop(child=child))

    async def output(self, child: str, limit: int) -> Tail:
        """Return the last ``limit`` bytes ``child`` wrote, over all its processes (at most 1 MiB is kept)."""
        self._requests += 1
        request, answer = self._requests, self._loop.create_future()
        self._outputs[request] = (bytearray(), answer)
        try:
            self._send(protocol.Output(request=request, child=child, limit=limit))
            tail: Tail = await answer
            return tail
        finally:
            del self._outputs[request]

    async def follow(self, child: str) -> AsyncIterator[Tail]:
        """Yield what ``child`` writes from now on; a reader that is too slow loses pieces."""
        follower = _Follower()
        followers = self._followers.setdefault(child, [])
        if not followers:
            self._send(protocol.Follow(child=child, on=True))
        followers.append(follower)
        try:
            while True:
                yield await follower.pieces.get()
        finally:
            followers.remove(follower)
            if not followers:
                self._followers.pop(child, None)
                self._send(protocol.Follow(child=child, on=False))

    async def shutdown(self, code: int = 0) -> None:
        """Have everything that is left killed and the launcher exit with ``code``; returns when it is done.

        This process should then end; the warden waits only a second for that.
        """
        self._ending = True
        self._send(protocol.Shutdown(code=code))
        await self._ended.wait()

    # News.

    async def happenings(self) -> AsyncIterator[protocol.Exited | protocol.Gone]:
        """Yield what becomes of the workers, in order; for one reader."""
        while True:
            yield await self._happenings.get()

    async def orders(self) -> AsyncIterator[protocol.Stop | protocol.Reload]:
        """Yield what the launcher's signals ask for; for one reader."""
        while True:
            yield await self._orders.get()

    def _send(self, message: protocol.FromAgent) -> None:
        packet = protocol.encode(message)
        if not self._unsent and self._pushed(packet):
            return
        if not self._unsent:
            self._loop.add_writer(self._socket.fileno(), self._writable)
        self._unsent.append(packet)

    def _pushed(self, packet: bytes) -> bool:
        try:
            self._socket.send(packet)
        except BlockingIOError:
            return False
        except OSError:
            self._warden_is_gone()
        return True

    def _writable(self) -> None:
        while self._unsent and self._pushed(self._unsent[0]):
            self._unsent.popleft()
        if not self._unsent:
            self._loop.remove_writer(self._socket.fileno())

    def _readable(self) -> None:
        for _ in range(_PACKETS_A_TURN):
            try:
                packet = self._socket.recv(protocol.MAX_PACKET)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._warden_is_gone()
                return
            self._take(protocol.from_warden(packet))

    def _warden_is_gone(self) -> None:
        if not self._ending:
            self._lost()
        self._stop_listening()
        self._ended.set()

    def _stop_listening(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())

    def _take(self, message: protocol.FromWarden) -> None:
        if self._handover is not None:
            self._hand_over(self._handover, message)
            return
        match message:
            case protocol.Exited() | protocol.Gone():
                self._happenings.put_nowait(message)
            case protocol.Stop() | protocol.Reload():
                self._orders.put_nowait(message)
            case protocol.Started() | protocol.StartFailed():
                started = self._starts.get(message.worker)
                if started is not None and not started.done():
                    started.set_result(message)
            case protocol.OutputPart(request=0):
                for follower in self._followers.get(message.child, ()):
                    follower.take(message)
            case protocol.OutputPart():
                self._answered(message)
            case _:
                raise protocol.ProtocolError(f"unexpected after the handover: {message!r}")

    def _hand_over(self, handover: list[protocol.FromWarden], message: protocol.FromWarden) -> None:
        if not isinstance(message, protocol.HandedOver):
            handover.append(message)
            return
        self._handover = None
        self.welcome = _welcome(handover)
        if not self._handed_over.done():
            self._handed_over.set_result(None)

    def _answered(self, part: protocol.OutputPart) -> None:
        if part.request not in self._outputs:
            return
        data, answer = self._outputs[part.request]
        data += part.data
        if part.last and not answer.done():
            answer.set_result(Tail(bytes(data), part.dropped))


def _welcome(messages: list[protocol.FromWarden]) -> Welcome:
    def of(kind: type[_T]) -> list[_T]:
        return [message for message in messages if isinstance(message, kind)]

    (first,) = of(protocol.Welcome)
    return Welcome(
        generation=first.generation,
        containment=first.containment,
        warden=first.warden,
        launcher_pid=first.launcher_pid,
        warden_pid=first.warden_pid,
        agent_pid=first.agent_pid,
        remembered={message.key: message.value for message in of(protocol.Remember)},
        leases={message.lease: message.deadline for message in of(protocol.Lease)},
        workers=tuple(of(protocol.WorkerRow)),
        starts={(message.name, message.epoch): message.start for message in of(protocol.Counted)},
    )
