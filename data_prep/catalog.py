"""Chooses one NCBI assembly for each species of a list."""

from __future__ import annotations

from typing import Any


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
