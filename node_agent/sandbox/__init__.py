"""An embedded cluster on one machine: etcd and PostgreSQL from Python wheels, hosts as processes."""

from __future__ import annotations

import os

# Servers are started by forking a process with gRPC threads in it.  gRPC's own handlers around fork crash one
# such child in five while calls are under way (measured: 60 of 300), before it can become the server.  It
# looks at this when it is first imported, which is after this module.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
