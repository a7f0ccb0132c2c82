"""Daemons that come with pgherd."""
