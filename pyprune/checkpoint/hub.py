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
from .headers import INDEX, SINGLE

_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:@(.+))?")


def at_revision(model: str, revision: str | None) -> str:
    """Write a hub id and the revision that was given apart from it as one: org/name@revision.

    Raises:
        InputError: the model is a folder here, or names another revision already.
    """
    if revision is None:
        return model
    match = _HUB_ID.fullmatch(model)
    if match is None or Path(model).exists():
        raise InputError(f"{model}: only a model of the hub (org/name) has revisions; leave out --revision {revision}")
    if match[2] not in (None, revision):
        raise InputError(f"{model} names a revision, and --revision {revision} another: give one of them")
    return f"{match[1]}@{revision}"


def checkpoint_folder(model: str) -> Path:
    """Return a folder as it is, and fetch a model of the hub (org/name, org/name@revision) into the hub's cache.

    Only the files that a pruning needs are fetched, and the licence. A revision is a branch, a tag or a commit.

    Raises:
        InputError: the hub does not have it or cannot be asked, it has no safetensors weights, or the first part of
            the id is a folder here: then the whole was meant as one.
    """
    folder = Path(model)
    try:
        match = _HUB_ID.fullmatch(model)
        if folder.exists() or match is None:
            return folder
        parent_is_here = folder.parent.is_dir()
    except (OSError, ValueError) as error:  # too long, or in a folder that may not be looked into
        raise InputError(f"{model}: cannot be looked for: {reason_of(error)}") from error
    if parent_is_here:
        raise InputError(_no_such_folder(folder))
    return _downloaded(match[1], match[2])


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
    name others. README.md comes along for the licence in its metadata. Left out are weights in other formats, or the
    same ones once more, and what is not of this model.
    """

    def path_of(name: str) -> Path | None:
        path = None if folder is None else folder / name
        return path if path is not None and path.is_file() else None

    wanted = ({"config.json", "README.md"} & set(names)) | companions_of(names, path_of)
    if SINGLE in names:  # transformers prefers it too
        return wanted | {SINGLE}
    if INDEX not in names:
        return wanted
    index = path_of(INDEX)
    return wanted | {INDEX} | (set() if index is None else _shards(read_json(index)) & set(names))


def _shards(index: Any) -> set[str]:
    """Names of an index's files; empty for what is not an index, which the checkpoint's reader reports."""
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    return {name for name in weight_map.values() if isinstance(name, str)} if isinstance(weight_map, dict) else set()


def _downloaded(model: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        names = {file.rfilename for file in HfApi().model_info(model, revision=revision).siblings or ()}
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _unavailable(model, revision, error) from error
    except Exception as first:  # no network, whose errors are of many libraries: what was fetched before will do
        try:
            cached = snapshot_download(model, revision=revision, allow_patterns=["config.json"], local_files_only=True)
            return Path(cached)
        except Exception:
            raise _unavailable(model, revision, first) from first
    if not {SINGLE, INDEX} & names:
        raise InputError(f"{model}: the hub has neither {SINGLE} nor {INDEX} of it; other weights are never loaded")
    wanted = wanted_files(names, None)
    while True:
        patterns = [glob.escape(name) for name in sorted(wanted)]
        try:
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
        except Exception as error:
            raise _unavailable(model, revision, error) from error
        more = wanted_files(names, folder) - wanted
        if not more:
            return folder
        wanted |= more


def _unavailable(model: str, revision: str | None, error: Exception) -> InputError:
    """Say why the hub does not give a model, and what its user can do."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    token = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, GatedRepoError):  # a kind of RepositoryNotFoundError
        page = f"{constants.ENDPOINT}/{model}"
        then = f"; then {token}" if get_token() is None else " with the account of your token"
        return InputError(f"{model}: its authors ask for consent to their terms: accept them at {page}{then}")
    if isinstance(error, RepositoryNotFoundError):
        why = token if get_token() is None else "the account of your token may not see it"
        return InputError(f"{model}: neither a folder here nor a public model of the hub; if it is private, {why}")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{model}: the hub has no branch, tag or commit {revision!r} of it{_revisions(model)}")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return InputError(f"{model}: neither a folder here nor to be had from the hub ({reason})")


def _revisions(model: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        refs = HfApi().list_repo_refs(model)
    except HfHubHTTPError:  # the list is a courtesy: what is wrong is known without it
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    return f"; it has {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else ""
