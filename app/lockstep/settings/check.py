"""The check of a setting's value."""


def check(holds: bool, name: str, value: object, fix: str) -> None:
    """Raise a ValueError that names the setting, its value and the fix, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} is {value}: {fix}")
