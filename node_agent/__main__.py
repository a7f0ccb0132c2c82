"""``python -m node_agent``: the agent process, started by the warden and by nobody else."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import uvloop

from node_agent.app import run
from registry.config import ConfigInvalid, load


def main() -> int:
    """Run the agent until it is told to stop; return its exit code."""
    # gRPC's core writes lines of its own to stderr; what matters in them is said by our events.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    parser = argparse.ArgumentParser(prog="python -m node_agent", description=__doc__)
    parser.add_argument("-c", "--config", type=Path, required=True)
    parser.add_argument("--control-fd", type=int, required=True, help="the warden's socket")
    arguments = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        config = load(arguments.config)
    except ConfigInvalid as invalid:
        print(invalid, file=sys.stderr)  # noqa: T201
        return 2
    return uvloop.run(run(config, arguments.control_fd))


if __name__ == "__main__":
    sys.exit(main())
