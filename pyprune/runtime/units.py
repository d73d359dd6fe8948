"""Bytes, seconds and counts in words, the same in the terminal, the report and the model card."""


def bytes_text(number: float) -> str:
    """Decimal units, as disks, GPUs' data sheets and the hub have them: 13.0 MB, 5.41 GB."""
    for size, unit, digits in ((10**9, "GB", 2), (10**6, "MB", 1), (10**3, "KB", 1)):
        if number >= size:
            return f"{number / size:,.{digits}f} {unit}"
    return f"{number} bytes"


def seconds_text(seconds: float) -> str:
    """12 min 5 s, 3.2 s or 45 ms."""
    if seconds >= 120:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def count_text(number: int) -> str:
    """Parameters as people name models: 6.74B, 6.5M."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= 0.9995 * size:  # what rounds to 1000M is 1B
            return f"{number / size:.3g}{letter}"
    return str(number)
