"""The warden's first child: the agent, its control socket, and the watch over it.

    down ──due──▶ silent ──Hello──▶ greeted ──reaped──▶ down
                     └──────reaped──────────────────────▶ down

At most one agent process exists.  Each has a generation and a socket pair of its own, and the warden closes
its end when the process is reaped, so nothing an older generation left behind can speak.
"""

from __future__ import annotations

import contextlib
import enum
import selectors
import socket
from collections import deque
from collections.abc import Callable, Sequence

from node_agent.warden import kernel, protocol
from node_agent.warden.respawn import Respawn
from node_agent.warden.spawn import Birth

HELLO_WITHIN = 60.0
"""Seconds an agent may take from its start to Hello: it imports gRPC, on a machine that may be booting."""
FORK_AGAIN = 0.1
"""Seconds after which a failed fork is tried again."""
_PACKETS_A_TURN = 64
_SECONDS_A_TURN = 0.01
_BUSY_PACKETS = 16


class State(enum.Enum):
    """See the module's drawing."""

    DOWN = "down"
    SILENT = "silent"
    GREETED = "greeted"


class Agent:
    """``argv`` is executed with ``--control-fd N`` added; ``take`` gets every message."""

    def __init__(
        self,
        argv: Sequence[str],
        birth: Birth,
        selector: selectors.BaseSelector,
        take: Callable[[protocol.FromAgent], None],
    ) -> None:
        self.state = State.DOWN
        self.generation = 0
        self.pid = 0
        self.hello = protocol.Hello()
        self._argv = argv
        self._birth = birth
        self._selector = selector
        self._take = take
        self._socket: socket.socket | None = None
        self._unsent: deque[bytes] = deque()
        self._started = 0.0
        self._petted = 0.0
        self._due = 0.0
        self._respawn = Respawn()

    @property
    def busy(self) -> bool:
        """So much is waiting to be sent that what can wait should."""
        return len(self._unsent) > _BUSY_PACKETS

    def next_check(self) -> float:
        """Return when :meth:`check` has something to do at the latest."""
        return self._due if self.state is State.DOWN else self._petted + self._limit() + 0.001

    def check(self, now: float) -> None:
        """Start an agent that is due, kill one that hangs."""
        if self.state is State.DOWN:
            if now >= self._due:
                self._start(now)
        elif now > self._petted + self._limit():
            kernel.complain(
                f"warden: agent {self.pid} has been silent for {now - self._petted:.1f} s, killed"
            )
            self.kill()
            self._petted = now

    def excuse(self, now: float) -> None:
        """The warden itself did not run for a while: the agent had no chance either."""
        self._petted = now

    def greet(self, hello: protocol.Hello) -> None:
        """The agent has said Hello."""
        self.state, self.hello = State.GREETED, hello

    def pet(self, now: float) -> None:
        """The agent's loop turns."""
        self._petted = now

    def kill(self) -> None:
        """SIGKILL the agent and what it has started in its own session."""
        if self.state is not State.DOWN:
            kernel.kill_group(self.pid)
            kernel.kill(self.pid)

    def ended(self, now: float) -> None:
        """The process is dead, and a zombie still."""
        kernel.kill_group(self.pid)
        self.hang_up()
        self._due = now + self._respawn.pause(now - self._started)
        self.state, self.pid = State.DOWN, 0

    def hang_up(self) -> None:
        """Close the socket; the agent takes it for the end of the warden."""
        if self._socket is not None:
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket = None
        self._unsent.clear()

    def tell(self, message: protocol.FromWarden) -> None:
        """Send a message to a greeted agent; there is nobody to tell otherwise."""
        if self.state is not State.GREETED or self._socket is None:
            return
        self._unsent.append(protocol.encode(message))
        if len(self._unsent) == 1:
            self._send()

    def _limit(self) -> float:
        return self.hello.hang_limit if self.state is State.GREETED else HELLO_WITHIN

    def _start(self, now: float) -> None:
        self._started = self._petted = now
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs, contextlib.ExitStack() as on_failure:
                on_failure.callback(ours.close)
                argv = [*self._argv, "--control-fd", str(theirs.fileno())]
                pid = self._birth.agent(argv, theirs.fileno())
                on_failure.pop_all()
        except OSError as error:
            kernel.complain(f"warden: no process for the agent: {error.strerror}")
            self._due = now + FORK_AGAIN
            return
        ours.setblocking(False)
        self.generation += 1
        self.pid, self.state, self._socket = pid, State.SILENT, ours
        self._selector.register(ours, selectors.EVENT_READ, self._ready)

    def _ready(self) -> None:
        self._send()
        until = kernel.boottime() + _SECONDS_A_TURN
        for _ in range(_PACKETS_A_TURN):
            if self._socket is None or kernel.boottime() > until:
                return
            try:
                packet = self._socket.recv(protocol.MAX_PACKET)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self._no_more_to_say()
                return
            try:
                message = protocol.from_agent(packet)
            except protocol.ProtocolError as error:
                kernel.complain(f"warden: {error}")
                continue
            self._take(message)

    def _no_more_to_say(self) -> None:
        """The agent's end is closed: it is dead, or useless."""
        self.hang_up()
        self.kill()

    def _send(self) -> None:
        if self._socket is None:
            return
        with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
            while self._unsent:
                self._socket.send(self._unsent[0])
                self._unsent.popleft()
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        if self._selector.get_key(self._socket).events != wanted:
            self._selector.modify(self._socket, wanted, self._ready)
