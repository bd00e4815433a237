"""Every setting, its default, its unit and its check; and how settings are read.

They come, the later ones winning, from the defaults below, the environment (`LOCKSTEP_SEED`, `LOCKSTEP_DATA__NAME`), a
YAML file or a preset (`--config`), and the command line (`--data.name mnist`).
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from jsonargparse import (  # type: ignore[attr-defined]  # exported, but not in its __all__
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    set_parsing_settings,
)

from app.cluster.failure import SettingsError

PRESETS = Path(__file__).parent / "presets"
ENVIRONMENT_PREFIX = "LOCKSTEP"
OTHER_VARIABLES = {f"LOCKSTEP_{name}" for name in ("CACHE", "DEFAULTS", "PYTHON", "SITE_TORCH", "VENV")}  # read by env/

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def _check(holds: bool, name: str, value: object, fix: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}: {fix}")


@dataclass(frozen=True)
class DataSettings:
    """What is learned from, and how it is divided over the ranks."""

    name: Literal["digits", "mnist", "synthetic"] = "digits"
    """digits: 5,000 real ones that need no network; mnist: all 70,000, downloaded once; synthetic: for speed tests."""

    root: str = "data"
    """Folder for downloaded data; on a cluster, one that all nodes share."""

    batch_size: int = 64
    """Samples in one *global* batch, which is divided over all ranks."""

    batch_size_per_rank: int | None = None
    """The other way to say it: the global batch is this times the number of ranks, and batch_size is ignored."""

    sharding: Literal["contiguous", "random", "hash"] = "contiguous"
    """How the samples of a global batch are dealt to the ranks."""

    num_samples: int = 4096
    """Samples of the synthetic data set."""

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, "data.batch_size", self.batch_size, "it must be at least 1")
        per_rank = self.batch_size_per_rank
        _check(per_rank is None or per_rank >= 1, "data.batch_size_per_rank", per_rank, "it must be at least 1")
        _check(self.num_samples >= 1, "data.num_samples", self.num_samples, "it must be at least 1")

    def global_batch_size(self, num_ranks: int) -> int:
        return self.batch_size if self.batch_size_per_rank is None else self.batch_size_per_rank * num_ranks


@dataclass(frozen=True)
class ModelSettings:
    """The seed's `Net`."""

    dropout1: float = 0.25
    """Probability of dropping a channel after the convolutions."""

    dropout2: float = 0.5
    """Probability of dropping a unit after the first linear layer."""

    def __post_init__(self) -> None:
        for name in ("dropout1", "dropout2"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"model.{name}", value, "a probability of at least 0 and below 1 is needed")


@dataclass(frozen=True)
class OptimizerSettings:
    """How the gradient becomes a step."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    """The optimizer, from torch.optim."""

    learning_rate: float = 0.05
    """The highest learning rate of the schedule."""

    momentum: float = 0.9
    """For sgd only."""

    weight_decay: float = 5e-4
    """Decay of the weights; coupled to the gradient except with adamw."""

    schedule: Literal["constant", "cosine"] = "cosine"
    """How the learning rate goes on after the warm-up: cosine falls to 0 at the last update."""

    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly from 0."""

    scale_learning_rate: bool = False
    """Multiply the learning rate by the number of ranks (Goyal et al. 2017), for batch_size_per_rank."""

    def __post_init__(self) -> None:
        rate = self.learning_rate
        _check(math.isfinite(rate) and rate > 0, "optimizer.learning_rate", rate, "it must be above 0")
        _check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "it must be at least 0 and below 1")
        _check(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "it must not be negative")
        _check(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "it must not be negative")


@dataclass(frozen=True)
class Settings:
    """One run. With no settings: the seed's network on the embedded digits, to 97 % or more."""

    run_dir: str | None = None
    """New folder for everything that the run leaves behind; by default runs/<date and time>."""

    seed: int = 0
    """The start of every random sequence: initial weights, order of samples, dropout."""

    num_epochs: int = 12
    """How often every sample is learned from."""

    precision: Literal["float32", "float64"] = "float32"
    """The data type of parameters and arithmetic."""

    log_interval: int = 100
    """Updates between two log lines; each costs one reduction over the ranks."""

    evaluate_every: int = 1
    """Epochs between two evaluations on the held-out samples; 0: only after the last epoch."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)

    def __post_init__(self) -> None:
        _check(0 <= self.seed < 2**63, "seed", self.seed, "it must lie in 0 ... 2^63 - 1")
        _check(self.num_epochs >= 0, "num_epochs", self.num_epochs, "it must not be negative")
        _check(self.log_interval >= 1, "log_interval", self.log_interval, "it must be at least 1")
        _check(self.evaluate_every >= 0, "evaluate_every", self.evaluate_every, "it must not be negative")
        scaled = self.optimizer.scale_learning_rate
        _check(
            not scaled or self.data.batch_size_per_rank is not None,
            "optimizer.scale_learning_rate",
            scaled,
            "it goes with data.batch_size_per_rank, where the global batch grows with the number of ranks",
        )


class _PresetOrFile(ActionConfigFile):
    """`--config seed` names a preset, `--config some/file.yaml` a file."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: str) -> None:
        preset = PRESETS / f"{value}.yaml"
        if not Path(value).exists() and not preset.is_file():
            names = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
            raise TypeError(f"there is no file {value!r} and no preset of that name (presets: {names})")
        ActionConfigFile.apply_config(parser, cfg, dest, value if Path(value).exists() else str(preset))


def parse_settings(args: Sequence[str] | None = None) -> Settings:
    """The settings that `args` (by default the command line) and the environment ask for.

    Raises:
        SettingsError: a setting is unknown or wrong.
        SystemExit: for --help and --print_config.
    """
    args = sys.argv[1:] if args is None else args
    parser = _parser(default_env=True)
    try:
        _refuse_unknown_environment(parser)
        return _settings_of(parser.instantiate(parser.parse_args(args)))
    except (ArgumentError, TypeError, ValueError) as error:
        hint = _nearest_setting(parser, args)
        raise SettingsError(f"{error}{hint}\nAll settings: python {sys.argv[0]} --help") from error


def load_settings(path: Path) -> Settings:
    """The settings of an earlier run, from the file that it saved.

    Raises:
        SettingsError: the file is missing, or is not such a file.
    """
    parser = _parser(default_env=False)
    try:
        return _settings_of(parser.instantiate(parser.parse_path(str(path))))
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        raise SettingsError(f"{path} does not hold the settings of a run: {error}") from error


def dump_settings(settings: Settings) -> str:
    """`settings` as YAML, such that `load_settings` and `--config` read them back."""
    parser = _parser(default_env=False)
    return str(parser.dump(parser.parse_object(asdict(settings))))


def _parser(default_env: bool) -> ArgumentParser:
    parser = ArgumentParser(
        prog="app/train.py",
        description="Trains synchronously over every rank of the job, then merges the model on rank 0.",
        default_env=default_env,
        env_prefix=ENVIRONMENT_PREFIX,
        exit_on_error=False,
        allow_abbrev=False,  # a setting that is not written out is a mistake
    )
    parser.add_argument("--config", action=_PresetOrFile, help="A YAML file, or the name of a preset in app/presets.")
    parser.add_class_arguments(Settings)
    return parser


def _settings_of(namespace: Any) -> Settings:
    return Settings(**{item.name: namespace[item.name] for item in fields(Settings)})


def _refuse_unknown_environment(parser: ArgumentParser) -> None:
    known = {f"{ENVIRONMENT_PREFIX}_{name.replace('.', '__').upper()}" for name in _setting_names(parser)}
    for variable in sorted(os.environ):
        if variable.startswith(f"{ENVIRONMENT_PREFIX}_") and variable not in known | OTHER_VARIABLES:
            raise ValueError(f"unknown setting in the environment: {variable}")


def _nearest_setting(parser: ArgumentParser, args: Sequence[str]) -> str:
    """For each unknown option, the setting that was probably meant."""
    names = _setting_names(parser)
    hints = []
    for option in (arg[2:].partition("=")[0] for arg in args if arg.startswith("--")):
        if option not in names:
            same_ending = [name for name in names if name.rpartition(".")[2] == option.rpartition(".")[2]]
            hints += (same_ending or get_close_matches(option, names, n=1))[:1]
    return f"\nDid you mean {', '.join('--' + name for name in hints)}?" if hints else ""


def _setting_names(parser: ArgumentParser) -> list[str]:
    return [*parser.get_defaults().keys(), "config", "print_config", "help", *(item.name for item in fields(Settings))]
