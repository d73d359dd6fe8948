"""The text that comes with the package."""

import json
import lzma
from importlib.resources import files

from .documents import Documents

BUILTIN = "builtin"
FILE = "builtin.jsonl.xz"


def builtin_documents() -> Documents:
    """Documents of the built-in text, English of the public domain; builtin.md beside the file names its sources."""
    packed = files(__package__).joinpath(FILE).read_bytes()
    lines = lzma.decompress(packed).decode().splitlines()
    return Documents(BUILTIN, (json.loads(line)["text"] for line in lines))
