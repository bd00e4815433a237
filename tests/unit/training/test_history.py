"""What a finished run may be asked to go on for."""

from dataclasses import replace

import pytest

from lockstep.runtime.errors import SettingsError
from lockstep.settings import OptimizerSettings, Settings, StopSettings
from lockstep.settings.reading import flat_settings
from lockstep.training.history import asks_for_more

WAS = Settings(num_epochs=3, stop=StopSettings(early="loss:min:2"))


def test_a_finished_run_goes_on_for_more_epochs_or_another_early_stop() -> None:
    assert not asks_for_more(WAS, WAS, "it")
    assert asks_for_more(WAS, replace(WAS, num_epochs=4), "it")
    assert asks_for_more(WAS, replace(WAS, stop=StopSettings(early="loss:min:3")), "it")
    with pytest.raises(SettingsError, match="log_interval is 7 and was 100: it can only go on for longer"):
        asks_for_more(WAS, replace(WAS, log_interval=7), "it")
    with pytest.raises(SettingsError, match=r"optimizer.freeze is"):
        asks_for_more(WAS, replace(WAS, num_epochs=4, optimizer=OptimizerSettings(freeze=["a.*"])), "it")
    grouped = OptimizerSettings(groups={"a.*": {"weight_decay": 0.0}})
    with pytest.raises(SettingsError, match=r"optimizer.groups is \[\['a.\*', "):
        asks_for_more(WAS, replace(WAS, num_epochs=4, optimizer=grouped), "it")
    assert flat_settings(replace(WAS, optimizer=grouped))["optimizer.groups"] == grouped.groups
