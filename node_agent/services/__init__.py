"""The gRPC services that need the agent around them: Supervision and Cluster."""
