"""What the manifest has beyond what training reads, for those who look at all of it: `finalize`, `verify` and `report`."""

from __future__ import annotations

from typing import Any

from data_prep.cli import InputError

ADDED = ("minimum_tokens", "run_bases", "strands", "packing", "duplicates_removed", "duplicates", "excluded")


def check_keys(where: str, manifest: dict[str, Any]) -> None:
    """Raise InputError when a manifest, read from `where`, is of an earlier version, which training can still use."""
    missing = [f"`{key}`" for key in ADDED if key not in manifest]
    if missing:
        raise InputError(f"{where}: made by an earlier version (no {', '.join(missing)}); shard again")
