"""Checks every byte of a dataset, and names what is wrong."""

from __future__ import annotations

from typing import Any


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
