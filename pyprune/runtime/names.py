"""Lists of names in the values of options."""


def split_names(text: str | None) -> list[str]:
    """Split NAME,NAME; empty for None."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
