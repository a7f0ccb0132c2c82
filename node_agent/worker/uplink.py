"""The worker's end of the worker socket: one thread that owns the connection to the agent.

The thread reads, gives what it read to ``hear``, acknowledges it, and attaches again for as long as it takes
when the agent is gone.  Answers may be posted from any thread and are written at once while the socket takes
them; what it does not take, the thread writes later.  When much waits for the agent the uplink is
``clogged``: no handler should be started, and above that nothing more is read.  Answers that no agent has
acknowledged are kept (the newest ``KEPT_ANSWERS``) and told to the next agent.

It knows frames and connections, and nothing of methods, mailboxes or handlers.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from node_agent.worker import framing
from registry.frames import encode
from registry.v1 import messages_pb2, names_pb2, worker_pb2

FIRST_BACKOFF = 0.01
"""Seconds between the first two attempts to attach; doubles up to ``LAST_BACKOFF``."""

LAST_BACKOFF = 1.0

KEPT_ANSWERS = 1024
"""Answers kept until an agent acknowledges them."""

KEPT_BYTES = 8 * 1024 * 1024
"""Bytes of answers kept until an agent acknowledges them; with the rest of Attach they fit into a message."""

CLOGGED_BYTES = 16 * 1024 * 1024
"""Bytes that may wait for an agent that does not read, before no handler is started."""

UNHEARD_BYTES = 32 * 1024 * 1024
"""Bytes that may wait for an agent that does not read, before it is not read from: what is answered without a
handler is bounded too."""

VECTOR = 64
"""Pieces that are given to the socket at once."""

TRACEBACK_BYTES = 64 * 1024

Hear = Callable[[worker_pb2.AgentMessage], Sequence[messages_pb2.Frame] | None]
"""Takes what an agent said; returns the answers that are due at once, perhaps none, or None when the agent
need not even know that it was taken.  Called from the thread."""


class Uplink:
    """The connection to the agent's worker socket at ``path``, for the process ``worker``.

    ``tick`` is called before each wait and returns how many seconds the wait may take.  ``clogged``: answers
    are made faster than the agent reads them; a tick follows when that is over.
    """

    def __init__(self, path: str, worker: str, hear: Hear, tick: Callable[[], float]) -> None:
        self._path = path
        self._worker = worker
        self._hear = hear
        self._tick = tick
        self.clogged = False
        self._thread = threading.Thread(target=self._main, name="pgherd-uplink", daemon=True)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Everything below is shared, and touched with the lock held.
        self._lock = threading.Lock()
        self._methods: tuple[names_pb2.Method, ...] = ()
        self._ready = False
        self._crashed: worker_pb2.Crashed | None = None
        self._closing = False
        self._socket: socket.socket | None = None
        self._backlog: deque[memoryview] = deque()
        self._backlog_bytes = 0
        self._taken = 0
        self._answers = 0
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0

    def start(self, methods: Iterable[names_pb2.Method] = ()) -> None:
        """Start the thread; ``methods`` is what the agent is told that this worker offers."""
        self._methods = tuple(methods)
        self._thread.start()

    def ready(self) -> None:
        """Tell this agent, and each later one, that the worker serves."""
        with self._lock:
            self._ready = True
            self._say(worker_pb2.WorkerMessage(ready=worker_pb2.Ready()))

    def crashed(self, why: str, details: str) -> None:
        """Tell the agent why the worker is about to exit, with a traceback; :meth:`close` waits for it."""
        text = details.encode()[-TRACEBACK_BYTES:].decode(errors="ignore")
        with self._lock:
            self._crashed = worker_pb2.Crashed(why=why, traceback=text)
            self._say(worker_pb2.WorkerMessage(crashed=self._crashed))

    def post(self, parts: Sequence[bytes]) -> None:
        """Send encoded answers; kept until an agent acknowledges them."""
        with self._lock:
            self._keep(parts)
            self._say_parts(parts)

    def close(self, within: float) -> bool:
        """Write what is left and end the thread; returns whether the agent read it ``within`` seconds."""
        with self._lock:
            self._closing = True
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join(within)
        return not self._thread.is_alive()

    # With the lock held.

    def _keep(self, parts: Iterable[bytes]) -> None:
        kept, attached = self._kept, self._socket is not None
        for part in parts:
            if attached:
                self._answers += 1
            kept.append((self._answers if attached else 0, part))
            self._kept_bytes += len(part)
        while len(kept) > KEPT_ANSWERS or self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= len(kept.popleft()[1])

    def _acknowledged(self, place: int) -> None:
        """Answers are numbered for each connection; 0 is what Attach has told."""
        kept = self._kept
        while kept and kept[0][0] <= place:
            self._kept_bytes -= len(kept.popleft()[1])

    def _say_parts(self, parts: Sequence[bytes]) -> None:
        for batch in framing.batches(parts):
            self._send(framing.pack_batch(batch, self._taken))

    def _say(self, message: worker_pb2.WorkerMessage) -> None:
        self._send(framing.pack(message))

    def _send(self, data: bytes) -> None:
        if self._socket is None:
            return
        written = 0
        if not self._backlog:
            try:
                written = self._socket.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                pass
            except OSError:
                # The agent is gone: reading says so too, and the thread attaches again.
                return
            if written == len(data):
                return
            os.eventfd_write(self._wake, 1)
        self._backlog.append(memoryview(data)[written:])
        self._backlog_bytes += len(data) - written
        self.clogged = self._backlog_bytes > CLOGGED_BYTES

    def _forget_backlog(self) -> None:
        self._backlog.clear()
        self._backlog_bytes = 0
        self.clogged = False

    # The thread.

    def _main(self) -> None:
        try:
            self._run()
        except BaseException:  # noqa: BLE001 - whatever it is ends the process
            # Without its thread the process is deaf: better none than one that nobody can reach or stop.
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def _run(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            connection = self._connect()
            if connection is not None:
                if self._serve(connection):
                    backoff = FIRST_BACKOFF
                with self._lock:
                    self._detach()
                    connection.close()
                    if self._closing:
                        return
            if self._pause(backoff):
                return
            backoff = min(LAST_BACKOFF, backoff * 2)

    def _connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.connect(self._path)
        except OSError:
            connection.close()
            return None
        connection.setblocking(False)
        return connection

    def _pause(self, seconds: float) -> bool:
        """Wait before the next attempt; returns whether there is nothing left to attach for."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if poll.poll(min(seconds, self._tick()) * 1000):
            os.eventfd_read(self._wake)
        with self._lock:
            return self._closing and self._crashed is None

    def _attach(self, connection: socket.socket) -> None:
        with self._lock:
            self._socket = connection
            attach = worker_pb2.Attach(
                protocol=framing.PROTOCOL,
                worker=self._worker,
                methods=self._methods,
                ready=self._ready,
                unacknowledged=messages_pb2.Batch.FromString(b"".join(part for _, part in self._kept)).frames,
            )
            self._say(worker_pb2.WorkerMessage(attach=attach))
            if self._crashed is not None:
                self._say(worker_pb2.WorkerMessage(crashed=self._crashed))

    def _detach(self) -> None:
        self._socket = None
        self._forget_backlog()
        self._taken = self._answers = 0
        self._kept = deque((0, part) for _, part in self._kept)

    def _serve(self, connection: socket.socket) -> bool:
        """Speak with one agent until either side ends it; returns whether the agent has said anything."""
        unpacker = framing.Unpacker()
        heard = said_all = False
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        self._attach(connection)
        while True:
            with self._lock:
                backlog = self._backlog_bytes
                if self._closing and not backlog and not said_all:
                    # Half a close: what the agent may still be writing must not break the connection before
                    # it has read our last words.  It closes when it has.
                    said_all = True
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_WR)
            wanted = select.POLLIN if backlog <= UNHEARD_BYTES else 0
            poll.register(connection, wanted | (select.POLLOUT if backlog else 0))
            for descriptor, happened in poll.poll(self._tick() * 1000):
                if descriptor == self._wake:
                    os.eventfd_read(self._wake)
                    continue
                if happened & select.POLLOUT:
                    self._write_backlog()
                if happened & ~select.POLLOUT:
                    try:
                        data = connection.recv(262_144)
                        messages = unpacker.feed(data)
                        for message in messages:
                            heard = True
                            self._understand(framing.agent_message(message))
                    except (OSError, framing.Garbage):
                        return heard
                    if not data:
                        return heard

    def _write_backlog(self) -> None:
        """Write what the socket takes now; what it does not take stays where it is, uncopied."""
        backlog = self._backlog
        with self._lock:
            assert self._socket is not None
            try:
                written = self._socket.sendmsg(islice(backlog, VECTOR), (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                self._forget_backlog()
                return
            self._backlog_bytes -= written
            while backlog and written >= len(backlog[0]):
                written -= len(backlog.popleft())
            if written:
                backlog[0] = backlog[0][written:]
            self.clogged = self._backlog_bytes > CLOGGED_BYTES

    def _understand(self, message: worker_pb2.AgentMessage) -> None:
        answers = self._hear(message)
        what = message.WhichOneof("is")
        with self._lock:
            if what == "attached":
                self._acknowledged(0)
            elif what == "batch":
                self._taken += len(message.batch.frames)
                if message.batch.accepted:
                    self._acknowledged(message.batch.accepted)
                if answers is not None:
                    self._answers += len(answers)
                    self._say_parts([encode(answer) for answer in answers])
