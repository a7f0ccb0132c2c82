"""Commands of the host: what the entry points of the group ``pgherd.commands`` name."""
