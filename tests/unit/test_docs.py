"""Generated pages, links on pages, and settings that the code uses."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest

from lockstep.models.networks import vit_blocks
from lockstep.settings import Settings
from lockstep.settings.page import page
from tests.launching import ROOT

SOURCES = "\n".join(path.read_text() for path in (ROOT / "app").rglob("*.py") if path.parent.name != "settings")
PASSED_ON = inspect.signature(vit_blocks).parameters  # as keyword arguments, by the settings' own names


def _settings(kind: Any = Settings, prefix: str = "") -> Iterator[str]:
    for item in fields(kind):
        inner = get_type_hints(kind)[item.name]
        if is_dataclass(inner):
            yield from _settings(inner, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name


NAMES = list(_settings())


def test_the_page_of_settings_is_that_of_the_code() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == page(), "python -m lockstep.settings.page > docs/settings.md"
    told = re.findall(r"^\| `--([\w.]+)` \|", page(), flags=re.MULTILINE)
    assert sorted(told) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_setting_is_dead(name: str) -> None:
    own = name.rpartition(".")[2]
    assert re.search(rf"\.{own}\b", SOURCES) or (name.startswith("model.vit.") and own in PASSED_ON)


@pytest.mark.parametrize(
    "document",
    sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]),
    ids=lambda p: p.name,
)
def test_what_a_page_points_to_is_there(document: Any) -> None:
    text = document.read_text()
    for target, anchor in re.findall(r"\]\(([^)#\s]+)(?:#([\w-]+))?\)", text):
        page = document.parent / target
        assert page.exists(), target
        headings = (
            [line.lstrip("# ").lower().replace(" ", "-") for line in page.read_text().splitlines()] if anchor else []
        )
        assert not anchor or anchor in headings, f"{target}#{anchor}"
    for script in re.findall(r"(?:app|slurm)/[\w/]+\.(?:py|sbatch)", text):
        assert (ROOT / script).exists(), script
