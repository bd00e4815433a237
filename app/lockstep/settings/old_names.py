"""Old names of settings, which are read for one more release."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

NEW_NAMES = {
    "proof.ledger": "checks.ledger",
    "proof.sentinel_interval": "checks.replica_interval",
    "proof.non_finite": "checks.non_finite",
    "proof.deterministic": "checks.deterministic",
}


def with_new_names(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Replace old names in a command line.

    Returns:
        The arguments, and a line for people for each name that was replaced.
    """
    replaced, messages = [], []
    for arg in args:
        name, equals, value = arg.removeprefix("--").partition("=")
        if arg.startswith("--") and name in NEW_NAMES:
            messages.append(f"--{name} is called --{NEW_NAMES[name]} now, and will not be read by the next release")
            arg = f"--{NEW_NAMES[name]}{equals}{value}"
        replaced.append(arg)
    return replaced, messages


def rename_variables(prefix: str) -> list[str]:
    """Give environment variables such as LOCKSTEP_PROOF__LEDGER their new names.

    Returns:
        A line for people for each that was renamed.
    """
    messages = []
    for old, new in NEW_NAMES.items():
        before, after = (f"{prefix}_{name.replace('.', '__').upper()}" for name in (old, new))
        if before in os.environ:
            os.environ.setdefault(after, os.environ.pop(before))
            messages.append(f"{before} is called {after} now, and will not be read by the next release")
    return messages


def rename_in_file(content: Mapping[Any, Any]) -> dict[Any, Any]:
    """Replace old names in the content of a settings file, which has groups as mappings or full names."""
    renamed: dict[Any, Any] = {}
    groups = {name.partition(".")[0] for name in NEW_NAMES}
    old_first = sorted(content.items(), key=lambda item: str(item[0]).partition(".")[0] not in groups)  # new names win
    for name, value in old_first:
        if name in NEW_NAMES:
            name, value = NEW_NAMES[name].split(".")[0], {NEW_NAMES[name].split(".")[1]: value}
        elif isinstance(value, Mapping) and any(f"{name}.{inner}" in NEW_NAMES for inner in value):
            known = {NEW_NAMES.get(f"{name}.{inner}", f"{name}.{inner}"): each for inner, each in value.items()}
            name, value = "checks", {full.split(".", 1)[1]: each for full, each in known.items()}
        if isinstance(value, Mapping) and isinstance(renamed.get(name), Mapping):
            value = {**renamed[name], **value}
        renamed[name] = value
    return renamed
