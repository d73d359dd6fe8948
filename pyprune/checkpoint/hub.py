"""Resolve a folder or a hub id to a checkpoint folder."""

import difflib
import glob
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runtime.files import read_json, reason_of
from .auxiliary_files import companions_of

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def checkpoint_folder(model: str) -> Path:
    """A folder as it is; a hub id (org/name) as the folder of its snapshot, of which only what is needed is fetched.

    InputError: the hub does not have it or cannot be asked, it has no safetensors weights, or the first part of the id
    is a folder here: then the whole was meant as one.
    """
    folder = Path(model)
    try:
        if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            return folder
        parent_is_here = folder.parent.is_dir()
    except (OSError, ValueError) as error:  # too long, or in a folder that may not be looked into
        raise InputError(f"{model}: cannot be looked for: {reason_of(error)}") from error
    if parent_is_here:
        raise InputError(_no_such_folder(folder))
    return _downloaded(model)


def _no_such_folder(folder: Path) -> str:
    try:
        close = difflib.get_close_matches(folder.name, [entry.name for entry in folder.parent.iterdir()], n=1)
    except OSError:
        close = []
    meant = f"; is it {folder.parent / close[0]}?" if close else ""
    return f"{folder}: no such folder{meant} (the hub is not asked: {folder.parent} is a folder here)"


def wanted_files(names: Collection[str], folder: Path | None) -> set[str]:
    """Select the names of a repository's files that make the checkpoint and belong to it.

    `folder` has the ones that were fetched already (None: none yet): the index, the tokenizer's settings and its code
    name others. Left out are weights in other formats, or the same ones once more, and what is not of this model.
    """

    def path_of(name: str) -> Path | None:
        path = None if folder is None else folder / name
        return path if path is not None and path.is_file() else None

    wanted = ({"config.json"} & set(names)) | companions_of(names, path_of)
    if _SINGLE in names:  # transformers prefers it too
        return wanted | {_SINGLE}
    if _INDEX not in names:
        return wanted
    index = path_of(_INDEX)
    return wanted | {_INDEX} | (set() if index is None else _shards(read_json(index)) & set(names))


def _shards(index: Any) -> set[str]:
    """Empty for what is not an index, which whoever reads the checkpoint will say."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    return {name for name in weight_map.values() if isinstance(name, str)} if isinstance(weight_map, dict) else set()


def _downloaded(model: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        names = {file.rfilename for file in HfApi().model_info(model).siblings or ()}
    except (RepositoryNotFoundError, GatedRepoError) as error:
        raise _not_to_be_had(model, error) from error
    except Exception as first:  # no network, whose errors are of many libraries: what was fetched before will do
        try:
            return Path(snapshot_download(model, allow_patterns=["config.json"], local_files_only=True))
        except Exception:
            raise _not_to_be_had(model, first) from first
    if not {_SINGLE, _INDEX} & names:
        raise InputError(f"{model}: the hub has neither {_SINGLE} nor {_INDEX} of it; other weights are never loaded")
    wanted = wanted_files(names, None)
    while True:
        try:
            folder = Path(snapshot_download(model, allow_patterns=[glob.escape(name) for name in sorted(wanted)]))
        except Exception as error:
            raise _not_to_be_had(model, error) from error
        more = wanted_files(names, folder) - wanted
        if not more:
            return folder
        wanted |= more


def _not_to_be_had(model: str, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(f"{model}: neither a folder here nor to be had from the hub ({reason})")
