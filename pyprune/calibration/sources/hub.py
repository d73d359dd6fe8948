"""Documents of a data set of the hub, streamed by the library `datasets` (extra `pyprune[data]`)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...errors import InputError
from ...runtime.files import reason_of
from .documents import Document, Documents
from .rows import RowReader

# name[:config[:split]]
_SPELLING = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^:]*)(?::(?P<split>[^:]+))?)?", re.ASCII)
_SPLIT = "train"  # where a data set has several and none is named


def hub_documents(spelled: str, column: str | None = None) -> Documents:
    """Documents of a data set of the hub, in the order of its rows, fetched as they are read.

    The commit is looked up first, and all rows come from it.

    Args:
        spelled: `name[:config[:split]]`; without a split `train`, or the only one.
        column: as `file_documents`.

    Raises:
        InputError: the library is missing, the hub does not answer, or it has no such data set, configuration or split.
    """
    match = _SPELLING.fullmatch(spelled)
    if match is None:
        raise InputError(f"{spelled}: neither a file here nor a data set of the hub, name[:config[:split]]")
    name, config, split = match["name"], match["config"] or None, match["split"]
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{spelled}: not a file here, and a data set of the hub needs the library datasets: "
            "pip install 'pyprune[data]'"
        ) from error
    revision = _commit(name, spelled)
    with _quiet(datasets):
        try:
            configs = datasets.get_dataset_config_names(name, revision=revision)
            config = _chosen(spelled, "configuration", config, configs, "default")
            splits = datasets.load_dataset(name, config, streaming=True, revision=revision)
            split = _chosen(spelled, "split", split, list(splits), _SPLIT)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{spelled}: the data set cannot be opened ({_first(error)})") from error
    place = ":".join((name, config, split))
    return Documents(spelled, _documents(splits[split], RowReader(column), place), whole=False, revision=revision)


def _commit(name: str, spelled: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return HfApi().dataset_info(name).sha
    except GatedRepoError as error:
        raise InputError(f"{spelled}: the hub gives this data set only to those it granted access: log in") from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{spelled}: neither a file here nor a data set of the hub (a private one needs a login)"
        ) from error
    except Exception as error:  # no network, whose errors are of many libraries
        raise InputError(f"{spelled}: not a file here, and the hub cannot be asked ({_first(error)})") from error


def _chosen(spelled: str, what: str, asked: str | None, there: list[str], usual: str) -> str:
    """The configuration or the split: the one asked for, else the usual one, else the only one."""
    if asked in there:
        return str(asked)
    if asked is None and (usual in there or len(there) == 1):
        return usual if usual in there else there[0]
    listed = ", ".join(there)
    if asked is None:
        raise InputError(f"{spelled}: the data set has several {what}s: name one of {listed}, as name:config:split")
    raise InputError(f"{spelled}: the data set has no {what} `{asked}`: it has {listed}")


def dataset_documents(dataset: Any, column: str | None = None) -> Documents:
    """Documents of a `datasets.Dataset` or `IterableDataset`, in order. InputError: it is a dictionary of splits."""
    if hasattr(dataset, "keys"):
        raise InputError(f"a data set of splits: give one of them, as dataset[{next(iter(dataset), _SPLIT)!r}]")
    place = type(dataset).__name__
    return Documents(place, _documents(dataset, RowReader(column), place), whole=False)


def is_dataset(text: Any) -> bool:
    """Whether a caller's object is one of the library `datasets`, without importing it."""
    return type(text).__module__.partition(".")[0] == "datasets"


def _documents(rows: Any, reader: RowReader, name: str) -> Iterator[Document]:
    iterator, number = iter(rows), 0
    while True:
        number += 1
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # the network went away, or a file is not what it is called
            raise InputError(f"{name}: row {number} cannot be read ({_first(error)})") from error
        yield reader.document(row, f"{name}, row {number}")


def _first(error: BaseException) -> str:
    """The first line of an error's message: the library's later lines are examples and addresses."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else reason_of(error)


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars of the library; they are put back."""
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            datasets.utils.logging.enable_progress_bar()
