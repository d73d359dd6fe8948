"""Small files that whoever reads them finds whole, and what they are named."""

import json
import os
import re
from pathlib import Path
from typing import Any


def write_json(document: Any, path: Path) -> None:
    """Whole or not at all: whoever reads the file, or kills this process, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def stem_of(name: str) -> str:
    """A device's name as a file's: small letters and digits, other characters as single dashes between them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
