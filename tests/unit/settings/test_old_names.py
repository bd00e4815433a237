"""Old names of settings are read from the command line, the environment, a file and a checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.parallel.tensor_slices import State
from lockstep.settings import CheckSettings, Settings
from lockstep.settings.old_names import NEW_NAMES
from lockstep.settings.reading import flat_settings, load_settings, parse_settings
from lockstep.training.checkpoint import commit, verify_checkpoint, write_parts

CHECKS = CheckSettings(ledger=True, replica_interval=7, non_finite="skip", deterministic=True)
OLD_FILE = "proof:\n  ledger: true\n  sentinel_interval: 7\n  non_finite: skip\n  deterministic: true\n"


def test_every_new_name_is_one_of_todays_and_no_old_name_is() -> None:
    assert set(NEW_NAMES.values()) <= flat_settings(Settings()).keys()
    assert not NEW_NAMES.keys() & flat_settings(Settings()).keys()


def test_typed_names_are_read_and_told_once_each(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["--proof.ledger", "true", "--proof.sentinel_interval=7", "--proof.non_finite", "skip"]
    settings, _ = parse_settings([*typed, "--proof.deterministic=true"])
    assert settings.checks == CHECKS
    told = capsys.readouterr().err
    for old, new in NEW_NAMES.items():
        assert told.count(f"--{old} is called --{new} now") == 1


def test_variables_are_read_and_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCKSTEP_PROOF__SENTINEL_INTERVAL", "7")
    monkeypatch.setenv("LOCKSTEP_CHECKS__REPLICA_INTERVAL", "")  # restored after the test, whatever is set
    monkeypatch.delenv("LOCKSTEP_CHECKS__REPLICA_INTERVAL")
    assert parse_settings([])[0].checks.replica_interval == 7
    assert (
        "LOCKSTEP_PROOF__SENTINEL_INTERVAL is called LOCKSTEP_CHECKS__REPLICA_INTERVAL now" in capsys.readouterr().err
    )


@pytest.mark.parametrize("content", [OLD_FILE, "proof.ledger: true\nproof: {deterministic: true}\n"])
def test_a_file_is_read_in_silence(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "settings.yaml").write_text(f"seed: 3\n{content}")
    expected = CHECKS if content == OLD_FILE else CheckSettings(ledger=True, deterministic=True)
    assert load_settings(tmp_path / "settings.yaml") == replace(Settings(), seed=3, checks=expected)
    assert parse_settings(["--config", str(tmp_path / "settings.yaml")])[0].checks == expected
    assert capsys.readouterr().err == ""


def test_old_and_new_names_in_one_file_are_put_together(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("checks: {deterministic: true}\nproof: {ledger: true}\n")
    assert load_settings(tmp_path / "settings.yaml").checks == CheckSettings(ledger=True, deterministic=True)


def test_an_unknown_name_in_the_old_group_is_refused(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("proof: {ledger: true, nonsense: 1}\n")
    with pytest.raises(Exception, match="nonsense"):
        load_settings(tmp_path / "settings.yaml")


def test_the_counters_of_a_checkpoint_have_todays_names(tmp_path: Path) -> None:
    state: State = {}
    counters = {"must_stay": {"proof.ledger": True, "seed": 0}, "window_of_ranks": [[1.0]], "epoch": 2}
    (tmp_path / ".writing-000000000003").mkdir()
    found = verify_checkpoint(commit(tmp_path, 3, [write_parts(tmp_path, 3, state)], counters, keep=1))
    assert found.counters == {
        "immutable_settings": {"checks.ledger": True, "seed": 0},
        "metric_sums_of_ranks": [[1.0]],
        "epoch": 2,
    }
