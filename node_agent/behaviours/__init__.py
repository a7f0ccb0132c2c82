"""What authors of daemons import.

from node_agent.behaviours import Reject, Server, call, cast
"""

from node_agent.behaviours.server import Reject, Server, Timer, call, cast

__all__ = ["Reject", "Server", "Timer", "call", "cast"]
