"""Documents of one source, in order, and a digest of those that were read."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Document = str | list[Message]


@dataclass
class Documents:
    """Documents of one source: strings, or conversations (lists of messages with `role` and `content`).

    name: for messages. whole: small enough to be read to its end; other sources are read in order, only until there
    are enough tokens. revision: commit of a data set of the hub.
    """

    name: str
    items: Iterator[Document]
    whole: bool = True
    revision: str | None = None
    _digest: Any = field(default_factory=hashlib.sha256, repr=False)

    def __iter__(self) -> Iterator[Document]:
        for document in self.items:
            written = json.dumps(document, sort_keys=True, default=str).encode()
            self._digest.update(len(written).to_bytes(8, "little") + written)
            yield document

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the documents read so far: the length and the JSON of each."""
        return self._digest.hexdigest()
