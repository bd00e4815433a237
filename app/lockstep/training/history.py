"""What a run was set to, attempt by attempt, and what one that is finished may still become."""

import json
from dataclasses import replace
from typing import Any

from lockstep.runtime.errors import SettingsError
from lockstep.settings import Settings
from lockstep.settings.reading import flat_settings
from lockstep.training.position import immutable_settings

_LENGTHS = {"classify": "num_epochs", "ppo": "ppo.total_steps"}


def as_saved(settings: Settings) -> Settings:
    """For --config and --resume, where the folder's own name would be in the way, and what was profiled is over."""
    return replace(settings, run_dir=None, profile=None)


def changes(was: Settings, now: Settings) -> dict[str, list[Any]]:
    """{name: [was, is]}, as they are saved."""
    flat = [json.loads(json.dumps(flat_settings(as_saved(settings)))) for settings in (was, now)]
    pairs = {name: [each.get(name) for each in flat] for name in [*flat[0], *flat[1]]}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def goes_on(was: Settings, now: Settings, who: str) -> bool:
    """Whether `now` asks a finished run, set to `was`, for more epochs; False where it asks for nothing else.

    Args:
        who: for the message.

    Raises:
        SettingsError: it asks for something else, and no more epochs.
    """
    changed = changes(was, now)
    length = _LENGTHS[was.task]
    if not changed or (was.task == now.task and flat_settings(now)[length] > flat_settings(was)[length]):
        if changed:
            _check_immutable(was, now)
        return bool(changed)
    told = ", ".join(f"{name} is {after} and was {before}" for name, (before, after) in changed.items())
    raise SettingsError(
        f"{who}, and {told}: it can only go on for longer, by a larger {length}; for another run name another folder"
    )


def _check_immutable(was: Settings, now: Settings) -> None:
    """What settings alone can tell, before anything in the folder is touched; the checkpoint tells the rest."""
    before, after = (json.loads(json.dumps(immutable_settings(settings, {}, num_shards=1))) for settings in (was, now))
    for name, value in after.items():
        if before[name] != value and name in flat_settings(now):
            raise SettingsError(f"{name} is {value} and was {before[name]}: a run that goes on cannot change it")
