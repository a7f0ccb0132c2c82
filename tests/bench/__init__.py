"""Benchmarks; ``./dev bench`` runs them."""

# First of all: it says what gRPC, when it is imported, is to do where processes are started from this one.
import node_agent.sandbox  # noqa: F401
