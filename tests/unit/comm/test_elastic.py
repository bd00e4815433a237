"""Which settings an elastic job refuses, and how it recognises its own run folder."""

from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.runtime.errors import SettingsError
from lockstep.settings import CheckSettings, DataSettings, GradientSettings, Settings
from lockstep.training.elastic import Run, check_elastic

SETTINGS = Settings(data=DataSettings(name="synthetic", num_samples=40, batch_size=8))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (replace(SETTINGS, parallel="zero3"), "parallel is zero3"),
        (replace(SETTINGS, gradient=GradientSettings(reduction="adasum")), "adasum"),
        (replace(SETTINGS, data=DataSettings(batch_size_per_rank=8)), "use data.batch_size"),
        (replace(SETTINGS, checks=CheckSettings(ledger=True, non_finite="skip")), "checks.non_finite is skip"),
    ],
)
def test_settings_whose_meaning_depends_on_the_number_of_workers_are_refused(settings: Settings, why: str) -> None:
    with pytest.raises(SettingsError, match=why) as refused:
        check_elastic(settings)
    assert refused.value.shared
    check_elastic(SETTINGS)
    check_elastic(replace(SETTINGS, checks=CheckSettings(ledger=True)))


def test_a_job_that_has_lost_all_workers_of_its_run_resumes_from_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "4711")
    monkeypatch.chdir(tmp_path)
    for settings in (SETTINGS, replace(SETTINGS, run_dir="run")):
        first = Run.open(settings, resume=False, elastic=True)
        assert not first.resume
        second = Run.open(settings, resume=False, elastic=True)
        assert second.resume
        assert second.folder.path.samefile(first.folder.path)
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "4712")  # another job
    with pytest.raises(SettingsError, match="not empty"):
        Run.open(replace(SETTINGS, run_dir="run"), resume=False, elastic=True)
    assert Run.open(replace(SETTINGS, run_dir="run"), resume=True, elastic=True).resume
    assert not Run.open(SETTINGS, resume=False, elastic=True).resume
