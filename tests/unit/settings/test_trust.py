"""Trust in settings files by their owners and modes. Creating files of other users needs root."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep.runtime.errors import SettingsError
from lockstep.settings.reading import PRESETS, dump_settings, flat_settings, load_settings, parse_settings
from lockstep.settings.trust import Source, check_trust, names_of_code, read_source
from lockstep.training.run_folder import replacing

NOBODY, STRANGER = 65534, 54321
CODE = {"data.name": ["theirs.data"]}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user's")

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str = "data: {name: theirs.data}", owner: int = -1, mode: int = 0o644) -> Path:
        file = tmp_path / "settings.yaml"
        file.write_text(text)
        os.chown(file, owner, owner)
        file.chmod(mode)
        return file

    return write


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a package `theirs` that creates a file when it is imported; returns that file."""
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass data: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "mark"


def test_the_users_own_file_is_their_word(write: Write) -> None:
    source = read_source(write())
    assert source == Source(source.path, "data: {name: theirs.data}")
    assert check_trust(source, CODE, trust=False) is None
    assert parse_settings(["--config", str(source.path)])[0].data.name == "theirs.data"


@needs_root
@pytest.mark.parametrize("owner", [NOBODY, STRANGER])
def test_a_strangers_file_must_be_trusted_only_if_it_names_code(write: Write, owner: int) -> None:
    source = read_source(write(owner=owner))
    assert source.other_owners == {owner}
    with pytest.raises(SettingsError, match=rf"uid {owner}.*theirs\.data.*nothing was imported.*--trust true"):
        check_trust(source, CODE, trust=False)
    assert check_trust(source, CODE, trust=True) is None
    assert check_trust(source, {}, trust=False) is None


@needs_root
def test_what_has_no_known_owner_is_not_even_nobodys(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
    assert read_source(write(owner=NOBODY)).other_owners == {NOBODY}
    assert read_source(write(owner=0)).other_owners == set()


def test_what_everybody_may_write_is_nobodys_word(write: Write) -> None:
    with pytest.raises(SettingsError, match="chmod o-w"):
        read_source(write(mode=0o666))


def test_what_a_group_may_write_is_warned_of(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(mode=0o664)
    parse_settings(["--config", str(file)])
    assert f"warning: {file} names code (data.name: theirs.data)" in capsys.readouterr().err
    parse_settings(["--config", str(write("seed: 1", mode=0o664))])
    assert not capsys.readouterr().err


def test_an_open_folder_on_the_way_gives_no_names(write: Write, tmp_path: Path) -> None:
    file = write()
    tmp_path.chmod(0o777)
    with pytest.raises(SettingsError, match=f"chmod o-w {tmp_path}"):
        check_trust(read_source(file), CODE, trust=True)
    tmp_path.chmod(0o1777)
    assert check_trust(read_source(file), CODE, trust=False) is None


@needs_root
def test_a_link_that_a_stranger_planted_is_not_followed(write: Write, tmp_path: Path) -> None:
    write("seed: 1")
    link = tmp_path / "latest"
    link.symlink_to(".")
    assert read_source(link / "settings.yaml").text == "seed: 1"
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(SettingsError, match=rf"latest is a link that uid {STRANGER} has put"):
        read_source(link / "settings.yaml")


@needs_root
def test_a_link_in_a_folder_of_its_owners_is_their_word(write: Write, tmp_path: Path) -> None:
    file = write()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "latest").symlink_to("..")
    for path in (theirs, theirs / "latest"):
        os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    assert read_source(theirs / "latest" / file.name).other_owners == {STRANGER}


def test_a_pipe_in_its_place_keeps_nobody_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "settings.yaml")
    with pytest.raises(SettingsError, match="not a file"):
        load_settings(tmp_path / "settings.yaml")


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"data.name": "mnist", "model.name": "resnet18", "env.id": "ALE/Pong-v5"}, {}),
        ({"model.name": "mine.Net"}, {"model.name": ["mine.Net"]}),
        ({"env.id": "mine:Env-v0"}, {"env.id": ["mine:Env-v0"]}),
        ({"env.options": {"config": {"other_vehicles_type": "mine.Car", "lanes": 3}}}, {"env.options": ["mine.Car"]}),
        ({"model.options": {"layers": [{"kind": "mine.Layer"}]}}, {"model.options": ["mine.Layer"]}),
        ({"model.options": {"pooling": "mean", "ratio": "0.5"}}, {}),
    ],
)
def test_names_of_code_are_found_wherever_they_stand(settings: dict[str, object], found: dict[str, list[str]]) -> None:
    assert names_of_code(settings) == found


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_presets_name_no_code(preset: str) -> None:
    """So they need no trust, even if the clone belongs to another user."""
    settings, _ = parse_settings(["--config", preset])
    assert not names_of_code(flat_settings(settings))
    assert not names_of_code({"env.options": settings.env.options, "model.options": settings.model.options})


@needs_root
def test_what_is_typed_is_the_users(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ["--config", str(write(owner=STRANGER))]
    assert parse_settings([*config, "--data.name", "theirs.data"])[0].data.name == "theirs.data"
    assert parse_settings([*config, "--data.name=digits"])[0].data.name == "digits"
    assert parse_settings([*config, "--trust", "true"])[0].data.name == "theirs.data"
    for typed in ([], ["--trust", "false"], ["--model.name", "theirs.data"]):
        with pytest.raises(SettingsError, match="nothing was imported"):
            parse_settings([*config, *typed])
    with pytest.raises(SettingsError, match="nothing was imported"):  # the file overrides the environment
        parse_settings(["--data.name", "mine.data", *config])
    monkeypatch.setenv("LOCKSTEP_DATA__NAME", "theirs.data")
    assert parse_settings(config)[0].data.name == "theirs.data"


@pytest.mark.parametrize("name", ["trust: true", "config: other.yaml"])
def test_some_settings_are_typed_only(write: Write, name: str) -> None:
    with pytest.raises(SettingsError, match="for the command line only"):
        parse_settings(["--config", str(write(name))])


def test_trust_is_not_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_TRUST", "true")
    with pytest.raises(SettingsError, match="unknown setting in the environment"):
        parse_settings([])


def test_trust_is_not_saved(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    settings, _ = parse_settings(["--config", str(write()), "--trust", "true"])
    assert "trust" not in dump_settings(settings)
    with pytest.raises(SystemExit):
        parse_settings(["--print_config"])
    assert "trust" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "data: {class_path: theirs.data, init_args: {}}",
        "data: theirs.data",
        "model: {options: {layer: {class_path: theirs.data, init_args: {}}}}",
        "env: {options: {layers: [{class_path: theirs.data}]}}",
        "run_dir: {class_path: theirs.data}",
        "seed: !!python/object/apply:theirs.data []",
        "data: {name: !!python/name:theirs.data x}",
    ],
)
def test_reading_settings_imports_nothing(write: Write, package: Path, text: str) -> None:
    file = write(text)
    for read in (lambda: parse_settings(["--config", str(file)]), lambda: load_settings(file, trust=True)):
        with contextlib.suppress(SettingsError):
            read()
        assert not package.exists()


@pytest.mark.parametrize("text", ["data: %s", "model: {vit: %s}", "model.vit: %s", "env: %s"])
def test_a_file_reads_no_other(write: Write, tmp_path: Path, text: str) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("{}")
    file = write(text % other)
    with pytest.raises(SettingsError, match="must say itself"):
        parse_settings(["--config", str(file)])
    with pytest.raises(SettingsError, match="read by --config alone"):
        parse_settings(["--data", str(other)])


def test_a_temporary_file_has_a_name_that_nobody_can_have_taken(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "file") as temporary:
            names.add(temporary.name)
            temporary.write_text("")
    assert len(names) == 3
    assert not any(str(os.getpid()) == name.rpartition(".")[2] for name in names)
