"""Generate the page of settings: `env/run python -m lockstep.settings.page > docs/settings.md`."""

import ast
import inspect
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

from lockstep.settings import Settings

HEAD = """# Every setting

Made by `env/run python -m lockstep.settings.page > docs/settings.md`; a test compares it with the code. A setting whose
default is empty is off, or its value is derived from others.

Sources, each overriding the ones before: the defaults, the environment (`LOCKSTEP_NUM_EPOCHS=3`,
`LOCKSTEP_OPTIMIZER__NAME=adam`), a YAML file or preset (`--config mine.yaml`, `--config reference`) and the command
line. A resumed run takes the settings in its own `settings.yaml` as defaults. `--help` lists all settings,
`--print_config` prints them as YAML.
"""


def page() -> str:
    """Return the page as Markdown, with a table for each group of settings."""
    parts = [HEAD, *_table("The run", "", Settings)]
    return "\n".join(parts) + "\n"


def _table(title: str, prefix: str, settings: Any) -> Iterator[str]:
    """Yield the table of a settings dataclass, then those of the dataclasses in it."""
    hints, texts = get_type_hints(settings), _texts(settings)
    yield f"## {title}\n\n| setting | default | what it does |\n| --- | --- | --- |"
    groups = [item for item in fields(settings) if is_dataclass(hints[item.name])]
    for item in fields(settings):
        if item not in groups:
            yield f"| `--{prefix}{item.name}` | {_default(item)} | {texts[item.name]} |"
    for group in groups:
        kind = hints[group.name]
        yield ""
        yield from _table(f"`{prefix}{group.name}`: {_sentence(inspect.getdoc(kind))}", f"{prefix}{group.name}.", kind)


def _texts(settings: Any) -> dict[str, str]:
    """Read the docstring below each field of a dataclass."""
    (definition,) = ast.parse(inspect.getsource(settings)).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def _default(item: "Field[Any]") -> str:
    value = item.default if item.default_factory is MISSING else item.default_factory()
    if value in (None, {}, []):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _sentence(text: str | None) -> str:
    return (text or "").split("\n")[0].rstrip(".")


if __name__ == "__main__":
    print(page(), end="")
