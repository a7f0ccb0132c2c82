"""No event loop outlives its test.

pytest-asyncio asks for the current loop before the first test; where none was ever set, Python 3.11 makes
one, which nobody closes, and some later test is blamed for it.  Saying "none" first avoids that.
"""

from __future__ import annotations

import asyncio


def pytest_configure() -> None:
    asyncio.set_event_loop(None)
