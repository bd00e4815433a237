"""How settings are read and saved.

They come, the later ones winning, from the defaults in config.py, the environment (`LOCKSTEP_SEED`,
`LOCKSTEP_DATA__NAME`), a YAML file or a preset (`--config`), and the command line (`--data.name mnist`).
"""

import glob
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import (  # type: ignore[attr-defined]  # exported, but not in its __all__
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    set_parsing_settings,
)

from app.cluster.failure import SettingsError
from app.cluster.hints import in_environment
from app.config import Settings

PRESETS = Path(__file__).parent / "presets"
ENVIRONMENT_PREFIX = "LOCKSTEP"
OTHER_VARIABLES = {  # of env/ and slurm/
    f"LOCKSTEP_{name}"
    for name in ("CACHE", "DEFAULTS", "JOB_END_TIME", "LAUNCHER", "PREFIX", "PYTHON", "SITE_TORCH", "VENV")
}
COMMANDS = {"config", "help", "print_config"}  # on the command line only
DEFAULT_RUN = Path("runs/latest")
SETTINGS_FILE = "settings.yaml"
TRAINS = "Trains synchronously over every rank of the job, then merges the model on rank 0."

T = TypeVar("T")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _PresetOrFile(ActionConfigFile):
    """`--config seed` names a preset, `--config some/file.yaml` a file."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: str) -> None:
        preset = PRESETS / f"{value}.yaml"
        if not Path(value).is_file() and not preset.is_file():
            names = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
            raise TypeError(f"there is no file {value!r} and no preset of that name (presets: {names})")
        ActionConfigFile.apply_config(parser, cfg, dest, value if Path(value).is_file() else str(preset))


def parse_settings(args: Sequence[str] | None = None) -> tuple[Settings, bool]:
    """The settings that `args` (by default the command line) and the environment ask for, and whether to `--resume`.

    A resumed run begins with the settings that it has saved in its folder; the environment, files and the command line
    change them.

    Raises:
        SettingsError: a setting is unknown or wrong.
        SystemExit: for --help and --print_config.
    """
    args = sys.argv[1:] if args is None else args
    parser = _parser(default_env=True)
    parser.add_argument("--resume", action="store_true", help=f"Go on with the run in run_dir, or in {DEFAULT_RUN}.")
    try:
        _refuse_unknown_environment(parser)
        parsed = parser.parse_args(args)
        run = parsed.run_dir or (str(DEFAULT_RUN.resolve()) if DEFAULT_RUN.exists() else None)
        if parsed.resume and run:
            parser.default_config_files = [glob.escape(f"{run}/{SETTINGS_FILE}")]  # the weakest of all sources
            parsed = parser.parse_args(args)
            parsed.run_dir = run
        return _settings_of(parser.instantiate(parsed)), parsed.resume
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        hint = _nearest_setting(parser, args)
        raise SettingsError(f"{error}{hint}\nAll settings: {_help(sys.argv[0])}") from error


def parse_benchmark(options: type[T], args: Sequence[str]) -> tuple[Settings, T]:
    """The settings in `args` and the environment, and the `options` (a dataclass) of a benchmark beside them.

    Raises:
        SettingsError: one of either is unknown or wrong.
        SystemExit: for --help and --print_config.
    """
    parser = _parser(default_env=True, prog="app/benchmark.py", description=options.__doc__ or "")
    parser.add_class_arguments(options)
    try:
        _refuse_unknown_environment(parser)
        parsed = parser.instantiate(parser.parse_args(args))
        return _settings_of(parsed), options(**{name: parsed[name] for name in options.__annotations__})
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        hint = _nearest_setting(parser, args)
        raise SettingsError(f"{error}{hint}\nAll settings: {_help(*sys.argv[:2])}") from error


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


def flat_settings(settings: Settings) -> dict[str, Any]:
    """All of them by their full names, such as `optimizer.learning_rate`."""
    return _flat(asdict(settings))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _parser(default_env: bool, prog: str = "app/train.py", description: str = TRAINS) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        description=description,
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
    settings = set(_setting_names(parser)) - COMMANDS
    known = {f"{ENVIRONMENT_PREFIX}_{name.replace('.', '__').upper()}" for name in settings}
    for variable in sorted(os.environ):
        if variable.startswith(f"{ENVIRONMENT_PREFIX}_") and variable not in known | OTHER_VARIABLES:
            raise ValueError(f"unknown setting in the environment: {variable}")


def _help(*program: str) -> str:
    return in_environment(shlex.join(["python", *program, "--help"]))


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
    return [*parser.get_defaults().keys(), *COMMANDS, *(item.name for item in fields(Settings))]
