"""Upload of an output to the hub."""

import re
from pathlib import Path
from typing import Any

from ..checkpoint import prove_files
from ..errors import InputError, VerificationError
from ..job.record import FILE, PruneRecord, read_record
from ..runtime.files import reason_of
from .card import FILE as CARD

# What tools leave in a folder: caches, states of other uploads, and hidden files.
_IGNORED = [".*", "**/.*", ".*/**", "*.partial", "*.partial/**", "journal.jsonl", "__pycache__/**"]
_AGAIN = "repeat the command; what was uploaded stays"
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def push(output: Path, repository: str, private: bool = False, message: str | None = None) -> dict[str, Any]:
    """Upload a finished output as it is to a model repository, which is made unless it exists.

    private: of a repository that is made; None of one that exists changes. An upload that was cut off goes on when it
    is repeated: the hub keeps the files that it has.

    Returns `output`, `repository`, `url`, `commit` and `notes`. InputError: no finished output, a wrong name, no token,
    no rights, or a hub that does not answer.
    """
    check_finished(output)
    _check_name(repository)
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise InputError(
            "the hub knows nobody here: log in by `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    api = HfApi()
    try:
        repo = api.create_repo(repository, private=private or None, exist_ok=True)
        commit: Any = api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=output,
            ignore_patterns=_IGNORED,
            commit_message=message or "Upload a model pruned by pyprune",
        )
    except Exception as error:
        raise _in_words(error, repository) from error
    notes = [] if (output / CARD).is_file() else [f"{output} has no {CARD}: the repository has no model card"]
    return {
        "output": str(output),
        "repository": repo.repo_id,
        "url": str(repo),
        "commit": commit.oid,
        "notes": notes,
    }


def check_finished(output: Path) -> PruneRecord:
    """The record of a finished, undamaged output. InputError: it is none."""
    if not output.is_dir():
        raise InputError(f"{output}: no such folder; give the output of `pyprune prune`")
    if output.name.endswith(".partial"):
        raise InputError(f"{output}: an unfinished run; finish it with `pyprune prune --resume`, then push its output")
    if not (output / FILE).is_file():
        raise InputError(
            f"{output}: no output of `pyprune prune` (it has no {FILE}); `hf upload` takes any other folder"
        )
    record = read_record(output)
    try:
        prove_files(output, record.checksums)
    except VerificationError as error:
        raise InputError(
            f"{output}: changed since it was pruned ({error}); `hf upload` takes it, but plan.json is not true of it"
        ) from error
    return record


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not _NAME.fullmatch(repository):
        raise InputError(f"{repository!r} is no repository's name: write it as org/name")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no repository's name: {' '.join(str(error).split())}") from error


def _in_words(error: Exception, repository: str) -> Exception:
    """An InputError where the hub or the network says what the user can mend; else the error itself."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if isinstance(error, LocalTokenNotFoundError):
        return InputError("the hub knows nobody here: log in by `hf auth login`, or set HF_TOKEN")
    if isinstance(error, OfflineModeIsEnabled):
        return InputError("HF_HUB_OFFLINE is set: unset it to push")
    if isinstance(error, HfHubHTTPError):
        return InputError(_refusal(error, repository))
    # The hub's library has its requests from httpx or, since 2.0, from httpx2, whose errors are other classes.
    lost = any(base.__name__ == "TransportError" for base in type(error).__mro__)
    if lost or isinstance(error, ConnectionError | TimeoutError):
        return InputError(f"the hub cannot be reached ({reason_of(error)}): {_AGAIN}")
    if isinstance(error.__cause__, Exception):  # "Error while uploading FILE", and why
        return _in_words(error.__cause__, repository)
    if isinstance(error, RuntimeError | OSError):
        return InputError(f"the upload to {repository} failed ({reason_of(error)}): {_AGAIN}")
    return error


def _refusal(error: Any, repository: str) -> str:
    """What the hub answered, in words."""
    status = error.response.status_code
    said = (error.server_message or str(error)).strip().splitlines()[0]
    if status == 401:
        return f"the hub does not take the token ({said}): log in again by `hf auth login`"
    if status in (403, 404):
        return f"no right to write to {repository} ({said}): check the name, and that the token may write"
    return f"the hub refused {repository} with status {status} ({said}): {_AGAIN}"
