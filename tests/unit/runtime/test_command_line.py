"""Commands that programs suggest, as the user would type them in the same folder."""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lockstep.runtime.command_line import PREFIX, in_environment, suggest
from tests.launching import ROOT, launch


@pytest.mark.parametrize(
    ("folder", "prefix", "expected"),
    [
        ("clone", "env/run", "env/run lockstep report runs/a"),
        ("clone", None, "lockstep report runs/a"),
        ("beside", "../clone/env/run", "../clone/env/run lockstep report runs/a"),
        ("gone", "/x y/env/run", "'/x y/env/run' lockstep report runs/a"),
    ],
)
def test_a_suggestion_can_be_pasted(
    folder: str, prefix: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("clone", "beside", "gone"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr("lockstep.runtime.command_line.ROOT", tmp_path / "clone")
    monkeypatch.chdir(tmp_path / folder)
    if prefix:
        monkeypatch.setenv(PREFIX, prefix)
    if folder == "gone":
        (tmp_path / folder).rmdir()
    assert suggest("report", "runs/a") == expected


def test_a_blank_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert suggest("report", "runs/a b") == "lockstep report 'runs/a b'"
    monkeypatch.setenv(PREFIX, "env/run")
    assert in_environment("mpirun -np 2") == "env/run mpirun -np 2"


@pytest.mark.parametrize(
    "how", ["env/run", *(pytest.param(how, marks=pytest.mark.thorough) for how in ("from beside", "activated"))]
)
def test_the_user_can_type_what_a_program_suggests(how: str, tmp_path: Path) -> None:
    """An unknown setting is refused with the command that shows them all; that command is then run in a fresh shell."""
    root, folder = ROOT, ROOT
    if how == "from beside":
        root, folder = Path(os.path.relpath(ROOT, tmp_path)), tmp_path
    command = f"'{root}/env/run' python '{root}/app/train.py' --no_such_setting 1"
    if how == "env/run":
        command = "env/run python app/train.py --no_such_setting 1"
    if how == "activated":
        command = "source env/activate; python app/train.py --no_such_setting 1"
    refused = launch(command, cwd=folder)
    assert refused.returncode == 2, refused.output
    (hint,) = re.findall(r"All settings: (.+)", refused.output)
    assert hint.startswith({"env/run": "env/run python", "activated": "python"}.get(how, "")), hint
    assert how == "activated" or "env/run" in hint
    fresh = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(Path.home()), "CUDA_VISIBLE_DEVICES": ""}
    bash = shutil.which("bash") or "bash"
    typed = f"source env/activate; {hint}" if how == "activated" else hint
    done = subprocess.run([bash, "-c", typed], cwd=folder, env=fresh, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--num_epochs" in done.stdout


@pytest.mark.parametrize(
    "path",
    [ROOT / "app" / "train.py", *sorted((ROOT / "app" / "lockstep" / "commands").glob("*.py"))],
    ids=lambda path: path.name,
)
def test_help_has_commands_that_can_be_pasted(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    for line in doc.splitlines():
        if re.match(r" *(\S+ )*(python app/|lockstep |mpirun -|horovodrun -)", line):
            assert "env/run " in line, line


def test_no_program_prints_a_bare_command() -> None:
    """What is printed is made by `suggest`, `train_program` and `in_environment`."""
    for path in (ROOT / "app").rglob("*.py"):
        tree = ast.parse(path.read_text())
        docs = {
            node.body[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docs:
                for found in re.findall(
                    r".*(?:\bpython app/train\.py|^lockstep (?:report|verify|doctor|postmortem) (?!--)).*", node.value
                ):
                    raise AssertionError(f"{path}, line {node.lineno}: {found}")
