"""How a setting is refused."""


def check(holds: bool, name: str, value: object, fix: str) -> None:
    """Raises ValueError, which names the setting, its value and what to do, unless `holds`."""
    if not holds:
        raise ValueError(f"{name} is {value}: {fix}")
