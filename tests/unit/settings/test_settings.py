"""Settings: read from all sources, checked, refused with one sentence, saved and read back."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from lockstep.runtime.errors import ExitCode, SettingsError
from lockstep.settings import Settings
from lockstep.settings.reading import PRESETS, build_options, dump_settings, load_settings, parse_settings


def test_no_arguments_give_the_defaults() -> None:
    assert parse_settings([]) == (Settings(), False)


def test_the_reference_preset_is_the_reference_run() -> None:
    settings, _ = parse_settings(["--config", "reference"])
    optimizer = settings.optimizer
    assert (settings.num_epochs, settings.data.batch_size, settings.log_interval) == (1, 32, 100)
    assert (optimizer.name, optimizer.learning_rate, optimizer.schedule) == ("sgd", 0.01, "constant")
    assert (optimizer.momentum, optimizer.weight_decay, optimizer.warmup_steps) == (0, 0, 0)
    assert (settings.model.dropout1, settings.model.dropout2) == (0.25, 0.5)


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.yaml")))
def test_every_preset_is_read_and_differs_from_the_defaults(preset: str) -> None:
    assert parse_settings(["--config", preset])[0] != Settings()


def test_the_command_line_wins_over_the_file_and_the_file_over_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 2\nnum_epochs: 3\n")
    monkeypatch.setenv("LOCKSTEP_SEED", "1")
    monkeypatch.setenv("LOCKSTEP_NUM_EPOCHS", "1")
    monkeypatch.setenv("LOCKSTEP_DATA__BATCH_SIZE", "17")
    settings, _ = parse_settings(["--config", str(file), "--num_epochs", "4"])
    assert (settings.data.batch_size, settings.seed, settings.num_epochs) == (17, 2, 4)


GROUPS = (
    "--optimizer.freeze",
    '["a.*"]',
    "--optimizer.groups",
    '{"b.*": {weight_decay: 0}, "*": {learning_rate_factor: 2}}',
)


def test_settings_are_read_back_as_they_were_saved(tmp_path: Path) -> None:
    settings, _ = parse_settings(["--config", "reference", "--seed", "5", "--data.batch_size_per_rank", "4", *GROUPS])
    (tmp_path / "settings.yaml").write_text(dump_settings(settings))
    assert load_settings(tmp_path / "settings.yaml") == settings
    assert list(settings.optimizer.groups) == ["b.*", "*"]
    assert parse_settings(["--config", str(tmp_path / "settings.yaml")]) == (settings, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nonsense", "1"], "nonsense"),
        (["--num_epoch", "1"], r"--num_epoch 1\s+Did you mean --num_epochs"),
        (["--learning_rate", "1"], r"Did you mean --optimizer\.learning_rate"),
        (["--num_epochs", "many"], "num_epochs"),
        (["--num_epochs", "-1"], "must not be negative"),
        (["--seed", "-1"], "seed is -1"),
        (["--log_interval", "0"], "at least 1"),
        (["--evaluate_every", "-1"], "negative"),
        (["--task", "ppo"], "model.name is net: ppo needs a policy: mlp or nature_cnn"),
        (["--task", "ppo", "--model.name", "mlp", "--parallel", "zero3"], "parallel is zero3: ppo acts on every rank"),
        (["--task", "ppo", "--model.name", "mlp", "--checks.ledger", "true"], "checks.ledger"),
        (["--ppo.num_minibatches", "200"], "ppo.num_steps must be no fewer"),
        (["--parallel", "zero2", "--optimizer.name", "lamb"], "it takes the norms of whole layers"),
        (["--parallel", "zero2", "--gradient.wire", "bf16"], "gradient.wire is bf16: it does not go with zero2"),
        (["--parallel", "zero3", "--model.compile", "true"], "model.compile is True: it does not go with zero3"),
        (["--parallel", "zero4"], "zero4"),
        (
            ["--optimizer.groups", '{"a.*": {lr: 2}}'],
            r"optimizer.groups of a.\* is .* learning_rate_factor, weight_decay",
        ),
        (["--optimizer.groups", '{"a.*": {learning_rate_factor: 0}}'], "above 0"),
        (["--stop.early", "loss"], "stop.early is loss: a held-out score, min or max, and a number"),
        (["--checkpoint.best", "loss:min:0"], "checkpoint.best is loss:min:0"),
        (["--stop.early", "loss:min:2", "--evaluate_every", "0"], "it needs evaluations on the way: evaluate_every"),
        (["--optimizer.step_at", "[0.7, 0.5]"], "rising shares of the run"),
        (["--data.std", "[0.0]"], "data.std"),
        (["--data.name", "cifar11"], "or a data set of your own"),
        (["--data.name", "imagenet"], "data.name"),
        (["--data.batch_size", "0"], "data.batch_size is 0"),
        (["--data.batch_size_per_rank", "0"], "data.batch_size_per_rank is 0"),
        (["--data.num_samples", "0"], "data.num_samples is 0"),
        (["--data.sharding", "hashed"], "data.sharding"),
        (["--model.dropout1", "1"], "model.dropout1 is 1"),
        (["--model.dropout2", "-0.1"], "model.dropout2 is -0.1"),
        (["--optimizer.learning_rate", "0"], "optimizer.learning_rate is 0"),
        (["--optimizer.learning_rate", ".nan"], "optimizer.learning_rate is nan"),
        (["--optimizer.momentum", "1"], "optimizer.momentum is 1"),
        (["--optimizer.weight_decay", "-1"], "optimizer.weight_decay is -1"),
        (["--optimizer.warmup_steps", "-1"], "optimizer.warmup_steps is -1"),
        (["--optimizer.scale_learning_rate", "true"], "batch_size_per_rank"),
        (["--config", "no-such"], r"no preset of that name \(presets: .*reference"),
        (["--precision", "float16"], "precision"),
        (["--gradient.bucket_mib", "0"], "gradient.bucket_mib is 0"),
        (["--gradient.num_micro_batches", "0"], "gradient.num_micro_batches is 0"),
        (["--gradient.wire", "int8"], "gradient.wire"),
        (["--gradient.wire", "bf16", "--gradient.reduction", "adasum"], "adasum sends gradients in full"),
        (["--checkpoint.interval", "-1"], "checkpoint.interval is -1"),
        (["--checkpoint.keep", "0"], "checkpoint.keep is 0"),
        (["--checks.replica_interval", "-1"], "checks.replica_interval is -1"),
        (["--checks.non_finite", "ignore"], "checks.non_finite"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_setting_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        parse_settings(arguments)
    assert caught.value.exit_code == ExitCode.SETTINGS


def test_a_resumed_run_begins_with_its_own_settings(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(dump_settings(replace(Settings(), seed=5, num_epochs=7)))
    settings, resume = parse_settings(["--resume", "--run_dir", str(tmp_path), "--num_epochs", "9"])
    assert resume
    assert (settings.seed, settings.num_epochs, settings.run_dir) == (5, 9, str(tmp_path))


def test_a_folder_with_a_name_like_a_pattern_is_resumed_with_its_own_settings(tmp_path: Path) -> None:
    run = tmp_path / "run[2]*"
    run.mkdir()
    (run / "settings.yaml").write_text(dump_settings(replace(Settings(), seed=5)))
    assert parse_settings(["--resume", "--run_dir", str(run)])[0].seed == 5


def test_resume_without_a_name_goes_on_with_the_last_run_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_settings(["--resume"]) == (Settings(), True)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "latest").symlink_to("first")
    assert parse_settings(["--resume"])[0].run_dir == str(tmp_path / "runs" / "first")


def test_a_run_that_never_began_is_resumed_from_the_defaults(tmp_path: Path) -> None:
    settings, resume = parse_settings(["--resume", "--run_dir", str(tmp_path / "new")])
    assert resume
    assert settings == replace(Settings(), run_dir=str(tmp_path / "new"))


def test_an_unknown_setting_in_a_file_or_in_the_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wrong.yaml").write_text("data:\n  bach_size: 3\n")
    with pytest.raises(SettingsError, match="bach_size"):
        parse_settings(["--config", str(tmp_path / "wrong.yaml")])
    monkeypatch.setenv("LOCKSTEP_NUM_EPOCH", "3")
    with pytest.raises(SettingsError, match="LOCKSTEP_NUM_EPOCH"):
        parse_settings([])


def test_a_settings_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("{{{")
    for file in (tmp_path / "settings.yaml", tmp_path / "missing.yaml"):
        with pytest.raises(SettingsError, match=str(file)):
            load_settings(file)


def test_the_global_batch_is_said_either_way() -> None:
    data = Settings().data
    assert replace(data, batch_size=32).global_batch_size(num_ranks=4) == 32
    assert replace(data, batch_size_per_rank=8).global_batch_size(num_ranks=4) == 32


@dataclass(frozen=True)
class _Inner:
    depth: int = 2


@dataclass(frozen=True)
class _Options:
    """Settings of a task."""

    size: tuple[int, int] = (3, 4)
    inner: _Inner = field(default_factory=_Inner)


def test_a_tasks_own_settings_are_built_as_they_are_declared() -> None:
    """From what a file holds of them: lists and dictionaries."""
    assert build_options(_Options, {}) == _Options()
    assert build_options(_Options, {"size": [5, 6], "inner": {"depth": 7}}) == _Options((5, 6), _Inner(7))
    for wrong in ({"sizes": [5, 6]}, {"size": "large"}):
        with pytest.raises(SettingsError, match=r"(?s)^options: .*size"):
            build_options(_Options, wrong)


@dataclass(frozen=True)
class _Nested:
    """Settings of a task."""

    inner: _Inner = field(default_factory=_Inner)


def test_no_file_stands_for_a_part_of_a_tasks_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would check whose it is."""
    monkeypatch.setattr("lockstep.settings.reading._options_of", lambda _: _Nested)
    (tmp_path / "theirs.yaml").write_text("depth: 7\n")
    typed = ["--task", "my.Task", "--options.inner", str(tmp_path / "theirs.yaml")]
    with pytest.raises(SettingsError, match="a file of settings is read by --config alone"):
        parse_settings(typed)
    (tmp_path / "mine.yaml").write_text(f"task: my.Task\noptions: {{inner: {tmp_path / 'theirs.yaml'}}}\n")
    with pytest.raises(SettingsError, match="it must say itself what is in that group"):
        parse_settings(["--config", str(tmp_path / "mine.yaml")])
    assert parse_settings(["--task", "my.Task", "--options.inner.depth", "3"])[0].options == {"inner": {"depth": 3}}


def test_saved_settings_of_a_task_that_it_no_longer_has_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lockstep.settings.reading._options_of", lambda _: _Nested)
    saved = dump_settings(Settings(task="my.Task", options={"gone": 3}))
    (tmp_path / "settings.yaml").write_text(saved)
    with pytest.raises(SettingsError, match="gone"):
        parse_settings(["--resume", "--run_dir", str(tmp_path)])
