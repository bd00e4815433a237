"""How the settings of a run have changed from attempt to attempt, and which changes a run that goes on allows."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from lockstep.runtime.errors import SettingsError
from lockstep.settings import Settings
from lockstep.settings.reading import flat_settings
from lockstep.training.optim import learning_rate_scale

_HOW_ALONE = ("channels_last", "compile")  # settings of a model that change how it computes, not what


def immutable_settings(settings: Settings, of_task: Mapping[str, Any], num_shards: int) -> dict[str, Any]:
    """Collect what a run cannot change when it is resumed, because its position and state would mean something else.

    Args:
        of_task: what its task adds.
        num_shards: of the data.
    """
    return {
        "task": settings.task,
        "seed": settings.seed,
        "precision": settings.precision,
        "model": {name: value for name, value in asdict(settings.model).items() if name not in _HOW_ALONE},
        "gradient.reduction": settings.gradient.reduction,
        "gradient.wire": settings.gradient.wire,
        "checks.ledger": settings.checks.ledger,  # a ledger of a part of the run would prove nothing
        **of_task,
        "optimizer.name": settings.optimizer.name,
        "optimizer.decay_vectors": settings.optimizer.decay_vectors,
        "optimizer.freeze": settings.optimizer.freeze,
        "optimizer.groups": [[pattern, own] for pattern, own in settings.optimizer.groups.items()],  # in their order
        "optimizer.average_decay": settings.optimizer.average_decay,
        "the scale of optimizer.learning_rate": learning_rate_scale(settings.optimizer, num_shards),
    }


def as_saved(settings: Settings) -> Settings:
    """Leave out what --config and --resume must not repeat: the folder's name, and the updates to profile."""
    return replace(settings, run_dir=None, profile=None)


def changes(was: Settings, now: Settings) -> dict[str, list[Any]]:
    """Compare settings as they are saved: {name: [was, is]}."""
    flat = [json.loads(json.dumps(flat_settings(as_saved(settings)))) for settings in (was, now)]
    pairs = {name: [each.get(name) for each in flat] for name in [*flat[0], *flat[1]]}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def asks_for_more(was: Settings, now: Settings, who: str) -> bool:
    """Whether `now` asks a finished run with settings `was` for more epochs or another early stop; False if nothing has
    changed.

    Args:
        who: names the run in messages.

    Raises:
        SettingsError: settings have changed, but not so.
    """
    changed = changes(was, now)
    length = "ppo.total_steps" if was.task == "ppo" else "num_epochs"
    is_longer = flat_settings(now)[length] > flat_settings(was)[length] or was.stop.early != now.stop.early
    if not changed or (was.task == now.task and is_longer):
        if changed:
            _check_immutable(was, now)
        return bool(changed)
    told = ", ".join(f"{name} is {after} and was {before}" for name, (before, after) in changed.items())
    raise SettingsError(
        f"{who}, and {told}: it can only go on for longer, by a larger {length}; for another run name another folder"
    )


def _check_immutable(was: Settings, now: Settings) -> None:
    """Refuse changed immutable settings before the folder is touched; what only a checkpoint knows is checked later."""
    before, after = (json.loads(json.dumps(immutable_settings(settings, {}, num_shards=1))) for settings in (was, now))
    for name, value in after.items():
        if before[name] != value and name in flat_settings(now):
            raise SettingsError(f"{name} is {value} and was {before[name]}: a run that goes on cannot change it")
