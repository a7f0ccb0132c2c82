"""What restarts are compared with: a process that does nothing but start its child again.

For each line of its input it kills the child, waits for its end, starts the next, and prints the seconds
until that runs its first statement.
"""

from __future__ import annotations

import asyncio
import sys
import time

CHILD = (sys.executable, "-S", "-c", "import os; os.write(1, b'.'); import time; time.sleep(1000)")


async def _running_child() -> asyncio.subprocess.Process:
    child = await asyncio.create_subprocess_exec(*CHILD, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    await child.stdout.readexactly(1)
    return child


async def supervise() -> None:
    """Serve standard input until it ends."""
    child = await _running_child()
    while await asyncio.to_thread(sys.stdin.readline):
        began = time.perf_counter()
        child.kill()
        await child.wait()
        child = await _running_child()
        print(time.perf_counter() - began, flush=True)
    child.kill()
    await child.wait()


if __name__ == "__main__":
    asyncio.run(supervise())
