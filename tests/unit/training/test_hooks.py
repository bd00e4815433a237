"""A user's own hooks, by their names."""

from pathlib import Path
from typing import Any, cast

import pytest

from lockstep.runtime.errors import SettingsError, UserCodeError
from lockstep.settings import Settings
from lockstep.settings.trust import names_of_code
from lockstep.training.hooks import NamedHook
from lockstep.training.trainer import Trainer

CODE = """
from lockstep import TrainerHook

class Writes(TrainerHook):
    called = []
    def before_update(self, trainer, item): self.called.append(("before_update", trainer, item))
    def after_update(self, trainer): self.called.append(("after_update", trainer))
    def at_checkpoint(self, trainer): self.called.append(("at_checkpoint", trainer))
    def at_end(self, trainer, evaluation): self.called.append(("at_end", trainer, evaluation))

class Fails(TrainerHook):
    def after_update(self, trainer):
        trainer / 0  # mine

class Needs(TrainerHook):
    def __init__(self, something): pass

class Other: pass
"""


@pytest.fixture
def _my_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_hooks_of_test.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("_my_hooks")
def test_a_named_hook_is_called_at_every_point() -> None:
    import my_hooks_of_test  # type: ignore[import-not-found]

    hook, trainer = NamedHook("my_hooks_of_test.Writes"), cast(Trainer, "trainer")
    hook.before_update(trainer, "item")
    hook.after_update(trainer)
    hook.at_checkpoint(trainer)
    hook.at_end(trainer, cast(Any, "evaluation"))
    assert my_hooks_of_test.Writes.called == [
        ("before_update", "trainer", "item"),
        ("after_update", "trainer"),
        ("at_checkpoint", "trainer"),
        ("at_end", "trainer", "evaluation"),
    ]


@pytest.mark.usefixtures("_my_hooks")
def test_its_errors_are_told_as_the_users() -> None:
    with pytest.raises(UserCodeError, match=r"my_hooks_of_test.Fails.after_update failed: TypeError(.|\n)*# mine"):
        NamedHook("my_hooks_of_test.Fails").after_update(cast(Trainer, "trainer"))
    with pytest.raises(UserCodeError, match=r"my_hooks_of_test.Needs failed: TypeError: .*something"):
        NamedHook("my_hooks_of_test.Needs")
    with pytest.raises(SettingsError, match=r"hooks is my_hooks_of_test.Other: it must give lockstep's TrainerHook"):
        NamedHook("my_hooks_of_test.Other")
    with pytest.raises(SettingsError, match="has no Missing"):
        NamedHook("my_hooks_of_test.Missing")


def test_hooks_are_names_of_code() -> None:
    assert Settings(hooks="mine.A, mine.B").hook_names == ["mine.A", "mine.B"]
    assert Settings().hook_names == []
    assert names_of_code({"hooks": "mine.A,mine.B"}) == {"hooks": ["mine.A,mine.B"]}
    assert names_of_code({"hooks": None}) == {}
    with pytest.raises(ValueError, match="hooks is MyHook: names of classes"):
        Settings(hooks="MyHook")
