"""Fixtures: etcd and PostgreSQL as real processes."""

from __future__ import annotations
