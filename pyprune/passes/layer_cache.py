"""Statistics of single layers, saved during the calibration pass: a killed run continues from them."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import load_cached, metadata_of, save_cached
from ..errors import InputError
from ..job.job import Job


class LayerLog:
    """One file a layer in `<file of the whole calibration pass>.layers`; without such a file nothing is kept.

    A context: the files go when it is left in the normal way, the whole calibration pass being kept, or by an
    InputError, after which nothing can go on; a killed run leaves them. `writes`: whether this process is the one that
    writes. `identity`: what the calibration pass follows from.
    """

    def __init__(self, job: Job, file: Path | None, identity: dict[str, Any], writes: bool = True) -> None:
        self.folder = None if file is None else file.with_suffix(".layers")
        self.writes = writes
        self._job, self._identity = job, identity

    def read(self, layer: int) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and metadata of a layer, or None. InputError for a damaged file, or one of another checkpoint."""
        file = self._file(layer)
        if file is None or not file.is_file():
            return None
        try:
            tensors, metadata = load_cached(file, "statistics of a layer", self._of(layer))
        except FileNotFoundError:  # another run of the same calibration pass is through
            return None
        self._job.reader.content.expect(metadata_of(metadata, "source", file), str(file))
        return tensors, metadata

    def write(self, layer: int, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        file = self._file(layer)
        if self.writes and file is not None:
            digests = self._job.reader.content.digests  # of this layer and of all that led to its input
            with suppress(FileNotFoundError):  # another run finished the same pass and removed the folder
                save_cached(tensors, file, metadata | {"source": json.dumps(digests)}, self._of(layer))

    def _of(self, layer: int) -> dict[str, Any]:
        return self._identity | {"layer": layer}

    def __enter__(self) -> "LayerLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.folder is None:
            return
        if self.writes and (kind is None or issubclass(kind, InputError)):
            shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # layers of this calibration pass, or other calibration passes, may be there
            self.folder.rmdir()
        with suppress(OSError):
            self.folder.parent.rmdir()

    def _file(self, layer: int) -> Path | None:
        return None if self.folder is None else self.folder / f"layer-{layer:05d}.safetensors"
