"""Statistics of single layers, kept as a survey goes, so that one that was killed need not take them again."""

import shutil
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoint import save_cached
from ..errors import InputError


class LayerLog:
    """One file a layer in `<file of the whole survey>.layers`.

    A context: the files go when it is left in the normal way, the whole survey being kept, or by an InputError, after
    which nothing can go on; a killed run leaves them. `writes`: whether this process is the one that writes.
    """

    def __init__(self, file: Path, writes: bool = True) -> None:
        self.folder = file.with_suffix(".layers")
        self.writes = writes

    def read(self, layer: int) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and metadata of a layer, or None. InputError for a damaged file."""
        file = self._file(layer)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as f:
                tensors = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
                return tensors, dict(f.metadata() or {})
        except FileNotFoundError:  # another run of the same survey is through
            return None
        except SafetensorError as error:
            raise InputError(f"{file}: damaged ({error}); delete it") from error

    def write(self, layer: int, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        if self.writes:
            with suppress(FileNotFoundError):  # another run of the same survey is through and removed the folder
                save_cached(tensors, self._file(layer), metadata)

    def __enter__(self) -> "LayerLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.writes and (kind is None or issubclass(kind, InputError)):
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # other surveys may be there
                self.folder.parent.rmdir()

    def _file(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05d}.safetensors"
