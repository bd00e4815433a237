"""Read and save settings.

Sources, each overriding the ones before: the defaults, the environment (`LOCKSTEP_SEED`, `LOCKSTEP_DATA__NAME`), a YAML
file or preset (`--config`), and the command line (`--data.name mnist`).
"""

import json
import os
import shlex
import sys
from argparse import SUPPRESS
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml  # type: ignore[import-untyped]
from jsonargparse import (  # type: ignore[attr-defined]  # exported, but not in its __all__
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    set_parsing_settings,
)

from lockstep.runtime.command_line import in_environment, this_program
from lockstep.runtime.errors import SettingsError
from lockstep.runtime.importing import import_object
from lockstep.settings import TASKS, Settings
from lockstep.settings.old_names import rename_in_file, rename_variables, with_new_names
from lockstep.settings.trust import HELP, NAMES, Source, check_trust, names_of_code, read_source

PRESETS = Path(__file__).parent / "presets"
ENVIRONMENT_PREFIX = "LOCKSTEP"
OTHER_VARIABLES = {  # used by env/ and slurm/, no settings
    f"LOCKSTEP_{name}"
    for name in ("CACHE", "DEFAULTS", "JOB_END_TIME", "LAUNCHER", "PREFIX", "PYTHON", "SITE_TORCH", "VENV")
}
OLD_PRESETS = {"seed": "reference"}  # for one more release
COMMANDS = {"config", "help", "print_config", "trust"}  # on the command line only
WITHOUT_OPTIONS = ("classify", "ppo")  # need not be imported to be told from others
DEFAULT_RUN = Path("runs/latest")
SETTINGS_FILE = "settings.yaml"
TRAINS = "Trains synchronously over every rank of the job, then merges the model on rank 0."

GROUPS = {"options", "model.vit", *(item.name for item in fields(Settings) if is_dataclass(item.type))}
BY_PATTERN = ("optimizer.groups",)  # whose keys are no names of settings
T = TypeVar("T")

NO_FILE_NAME = "\n#" + 300 * "-"  # makes a text longer than any file name, so that jsonargparse opens no such file

set_parsing_settings(
    docstring_parse_attribute_docstrings=True,
    import_path_denylist=["*"],  # jsonargparse would import a `class_path` in a value
    instantiate_subclass_spec_in_any=False,
)


class _Parser(ArgumentParser):
    """A parser that records the settings files it has read.

    Attributes:
        sources: those files.
        has_own_options: the settings of a user's own task are arguments of it, one by one.
        not_files: names of groups of settings, none of which may be given as a file.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sources: list[Source] = []
        self.has_own_options = False
        self.not_files = GROUPS

    def read(self, path: Path) -> str:
        """Read a settings file, which must not refer to other files.

        Raises:
            TypeError: it is not a settings file, or refers to another one.
            SettingsError: every user may write it.
        """
        source = read_source(path)
        try:
            content = yaml.safe_load(source.text)
        except yaml.YAMLError as error:
            raise TypeError(f"{path} is no settings file: {error}") from error
        if not isinstance(content, Mapping):
            raise TypeError(f"{path} is no settings file: it must hold names and values")
        for name, value in _with_groups(content):
            if name in COMMANDS:
                raise TypeError(f"{path} gives {name}, which is for the command line only")
            if name in self.not_files and isinstance(value, str):
                raise TypeError(f"{path} gives {name} as {value}: it must say itself what is in that group")
        if (renamed := rename_in_file(content)) != content:
            source = replace(source, text=yaml.safe_dump(renamed, sort_keys=False))
        self.sources.append(source)
        return source.text + NO_FILE_NAME

    def check_trust(self, settings: Settings, typed: Sequence[str], trust: bool) -> None:
        """Check that names of code in `settings` which come from a file, and were not typed, are trusted.

        Raises:
            SettingsError: they are not.
        """
        effective = _names_of_code(settings)
        for source in dict.fromkeys(self.sources):  # a resume reads files twice
            # This source alone; every option counts, since options of several sources may be merged.
            given = names_of_code(_parser(default_env=False).parse_string(source.text + NO_FILE_NAME))
            theirs = {
                setting: those
                for setting, names in given.items()
                if (
                    those := [
                        name
                        for name in names
                        if name in effective.get(setting, ()) and not _is_typed(setting, name, typed)
                    ]
                )
            }
            if warning := check_trust(source, theirs, trust):
                print(f"lockstep: warning: {warning}", file=sys.stderr, flush=True)


class _PresetOrFile(ActionConfigFile):
    """The action of `--config`, which takes a preset's name (`reference`) or a file (`some/file.yaml`)."""

    @staticmethod
    def apply_config(parser: Any, cfg: Any, dest: str, value: str) -> None:
        preset = PRESETS / f"{OLD_PRESETS.get(value, value)}.yaml"
        if not Path(value).is_file() and not preset.is_file():
            names = ", ".join(sorted(path.stem for path in PRESETS.glob("*.yaml")))
            raise TypeError(f"there is no file {value!r} and no preset of that name (presets: {names})")
        ActionConfigFile.apply_config(
            parser, cfg, dest, parser.read(Path(value)) if Path(value).is_file() else str(preset)
        )


def parse_settings(args: Sequence[str] | None = None) -> tuple[Settings, bool]:
    """Read settings from `args` (by default the command line) and the environment, and whether to `--resume`.

    A resumed run takes the settings saved in its folder as defaults; the environment, files and the command line
    override them.

    Raises:
        SettingsError: a setting is unknown or wrong.
        SystemExit: for --help and --print_config.
    """
    args = _with_new_names(sys.argv[1:] if args is None else args)
    plain = [arg for arg in args if arg.partition("=")[0] not in ("-h", "--help", "--print_config")]
    try:
        settings, resume = _parse_settings(plain)
    except SettingsError:
        if plain == args:
            raise
        settings, resume = Settings(), False
    options = _options_of(TASKS.get(settings.task, settings.task)) if settings.task not in WITHOUT_OPTIONS else None
    return (settings, resume) if options is None and plain == args else _parse_settings(args, options)


def _parse_settings(args: Sequence[str], options: type[Any] | None = None) -> tuple[Settings, bool]:
    """Read settings and whether to resume.

    Args:
        options: the dataclass of the task's own settings; None: they are not checked, or there are none.
    """
    parser = _parser(default_env=True, options=options)
    parser.add_argument("--resume", action="store_true", help=f"Go on with the run in run_dir, or in {DEFAULT_RUN}.")
    try:
        _refuse_unknown_environment(parser)
        _refuse_files_of_groups(args, parser.not_files)
        parsed = parser.parse_args(args)
        run = parsed.run_dir or (str(DEFAULT_RUN.resolve()) if DEFAULT_RUN.exists() else None)
        if parsed.resume and run:
            # The path is not resolved: the owner of a link counts.
            _begin_with(parser, Path(parsed.run_dir or DEFAULT_RUN) / SETTINGS_FILE)
            parsed = parser.parse_args(args)
            parsed.run_dir = run
        settings = _settings_of(parser.instantiate(parsed))
        parser.check_trust(settings, args, parsed.get("trust", False))
        return settings, parsed.resume
    except (ArgumentError, TypeError, ValueError, KeyError, OSError) as error:  # KeyError: of an option that is gone
        hint = _nearest_setting(parser, args)
        raise SettingsError(f"{error}{hint}\nAll settings: {_help()}") from error


def _options_of(task: str) -> type[Any] | None:
    """Import a user's own task, and return the dataclass of its own settings, if it has one.

    Raises:
        SettingsError: the task cannot be imported.
    """
    options = getattr(import_object(task, "task"), "Options", None)
    if options is not None and not (isinstance(options, type) and is_dataclass(options)):
        raise SettingsError(f"{task}.Options must be a dataclass, and is {options!r}")
    return options


def build_options(kind: type[T], given: Mapping[str, Any]) -> T:
    """Build the dataclass of a task's own settings from what the settings hold of it.

    Raises:
        SettingsError: a name or a value is wrong.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "options")
    try:
        built: T = parser.instantiate(parser.parse_object({"options": dict(given)})).options
    except (ArgumentError, TypeError, ValueError) as error:
        raise SettingsError(f"options: {error}") from error
    return built


def parse_benchmark(options: type[T], args: Sequence[str]) -> tuple[Settings, T]:
    """Read settings and the further `options` (a dataclass) of a benchmark from `args` and the environment.

    Raises:
        SettingsError: a setting or an option is unknown or wrong.
        SystemExit: for --help and --print_config.
    """
    args = _with_new_names(args)
    parser = _parser(default_env=True, prog="lockstep benchmark", description=options.__doc__ or "")
    parser.add_class_arguments(options)
    try:
        _refuse_unknown_environment(parser)
        _refuse_files_of_groups(args, parser.not_files)
        parsed = parser.instantiate(parser.parse_args(args))
        settings = _settings_of(parsed)
        parser.check_trust(settings, args, parsed.get("trust", False))
        return settings, options(**{name: parsed[name] for name in options.__annotations__})
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        hint = _nearest_setting(parser, args)
        raise SettingsError(f"{error}{hint}\nAll settings: {_help(sys.argv[1])}") from error


def load_settings(path: Path, trust: bool = False) -> Settings:
    """Load the settings that a run saved in a file.

    Args:
        trust: the user has typed `--trust true`, or nothing that the settings name will be imported.

    Raises:
        SettingsError: the file is missing or no settings file, or it names code and other users could have written it.
    """
    parser = _parser(default_env=False)
    try:
        settings = _settings_of(parser.instantiate(parser.parse_string(parser.read(path))))
        parser.check_trust(settings, (), trust)
        return settings
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        raise SettingsError(f"{path} does not hold the settings of a run: {error}") from error


def dump_settings(settings: Settings) -> str:
    """Format `settings` as YAML for `load_settings` and `--config`."""
    parser = _parser(default_env=False)
    return str(parser.dump(parser.parse_object(asdict(settings))))


def flat_settings(settings: Settings) -> dict[str, Any]:
    """Flatten settings to a dictionary by full names, such as `optimizer.learning_rate`."""
    return _flat(asdict(settings))


def _with_new_names(args: Sequence[str]) -> list[str]:
    """Replace old names in `args` and the environment, with a line on stderr for each."""
    replaced, messages = with_new_names(args)
    for line in [*messages, *rename_variables(ENVIRONMENT_PREFIX)]:
        print(f"lockstep: {line}", file=sys.stderr, flush=True)
    return replaced


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        is_group = isinstance(value, Mapping) and prefix + name not in BY_PATTERN
        flat |= _flat(value, f"{prefix}{name}.") if is_group else {prefix + name: value}
    return flat


def _parser(
    default_env: bool,
    prog: str = "app/train.py",
    description: str = TRAINS,
    options: type[Any] | None = None,
) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        default_env=default_env,
        env_prefix=ENVIRONMENT_PREFIX,
        exit_on_error=False,
        allow_abbrev=False,  # an abbreviated name is probably a mistake
    )
    parser.add_argument("--config", action=_PresetOrFile, help="A YAML file, or the name of a preset.")
    parser.add_argument("--trust", type=bool, default=SUPPRESS, help=f"{HELP} (typed only).")
    if options is None:
        parser.add_class_arguments(Settings)
    else:
        parser.add_class_arguments(Settings, skip={"options"})
        parser.add_class_arguments(options, "options")
        parser.has_own_options = True
        parser.not_files = GROUPS | _groups_of(options, "options.")
    return parser


def _begin_with(parser: _Parser, saved: Path) -> None:
    """Use the settings in the file `saved`, if it exists, as defaults, which every other source overrides."""
    if saved.exists():
        alone = _parser(default_env=False).parse_string(parser.read(saved))
        defaults = {name: value for name, value in alone.items() if name not in COMMANDS}
        if parser.has_own_options:
            defaults |= {f"options.{name}": value for name, value in defaults.pop("options").items()}
        parser.set_defaults(defaults)


def _names_of_code(settings: Settings) -> dict[str, list[str]]:
    whole = {
        "options": settings.options,
        "model.options": settings.model.options,
        "env.options": settings.env.options,
    }
    return names_of_code(flat_settings(settings) | whole)


def _is_typed(setting: str, name: str, args: Sequence[str]) -> bool:
    """Whether the user gave `name` for `setting` on the command line or in the environment."""
    pairs = zip(args, [*args[1:], ""], strict=False)
    typed = any(arg == f"--{setting}={name}" or (arg, value) == (f"--{setting}", name) for arg, value in pairs)
    return setting in NAMES and (typed or os.environ.get(_variable(setting)) == name)


def _variable(setting: str) -> str:
    return f"{ENVIRONMENT_PREFIX}_{setting.replace('.', '__').upper()}"


def _with_groups(content: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every full name in `content` with its value, including groups such as `data`."""
    for name, value in content.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from _with_groups(value, f"{prefix}{name}.")


def _refuse_files_of_groups(args: Sequence[str], groups: Collection[str]) -> None:
    """Raise TypeError if a file is given for a group of settings, such as `--data FILE`: jsonargparse would read it
    without the check of its owner.
    """
    typed = [arg[2:].partition("=") if arg.startswith("--") else ("", "", "") for arg in args]
    values = [
        (name, value if is_whole else following)
        for (name, is_whole, value), following in zip(typed, [*args[1:], ""], strict=False)
    ]
    for name, value in [*values, *((group, os.environ.get(_variable(group), "{")) for group in groups)]:
        if name in groups and not value.startswith("{"):
            raise TypeError(f"{name} is {value}: a file of settings is read by --config alone")


def _groups_of(options: type[Any], prefix: str) -> set[str]:
    """Name the dataclasses within a dataclass of settings, at any depth."""
    found: set[str] = set()
    for name, kind in get_type_hints(options).items():
        if isinstance(kind, type) and is_dataclass(kind):
            found |= {prefix + name, *_groups_of(kind, f"{prefix}{name}.")}
    return found


def _settings_of(namespace: Any) -> Settings:
    values = {item.name: namespace[item.name] for item in fields(Settings)}
    own = values["options"]
    if is_dataclass(own) and not isinstance(own, type):
        values["options"] = json.loads(json.dumps(asdict(own), default=str))  # as a file will hold them
    return Settings(**values)


def _refuse_unknown_environment(parser: ArgumentParser) -> None:
    settings = set(_setting_names(parser)) - COMMANDS
    known = {_variable(name) for name in settings}
    ours = [name for name in sorted(os.environ) if name.startswith(f"{ENVIRONMENT_PREFIX}_")]
    if "options" in settings:  # those of a task of one's own are not known yet
        ours = [name for name in ours if not name.startswith(_variable("options."))]
    for variable in ours:
        if variable not in known | OTHER_VARIABLES:
            raise ValueError(f"unknown setting in the environment: {variable}")


def _help(*kind: str) -> str:
    return in_environment(shlex.join([*this_program(), *kind, "--help"]))


def _nearest_setting(parser: ArgumentParser, args: Sequence[str]) -> str:
    """Suggest for each unknown option the setting that was probably meant."""
    names = _setting_names(parser)
    hints = []
    for option in (arg[2:].partition("=")[0] for arg in args if arg.startswith("--")):
        if option not in names:
            same_ending = [name for name in names if name.rpartition(".")[2] == option.rpartition(".")[2]]
            hints += (same_ending or get_close_matches(option, names, n=1))[:1]
    return f"\nDid you mean {', '.join('--' + name for name in hints)}?" if hints else ""


def _setting_names(parser: ArgumentParser) -> list[str]:
    return [*parser.get_defaults().keys(), *COMMANDS, *(item.name for item in fields(Settings))]
