"""From what the user typed to a checkpoint folder."""

import re
from pathlib import Path

from ..errors import InputError

_WANTED = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja"]


def checkpoint_folder(model: str) -> Path:
    """A folder as it is; a hub id (org/name) as the folder of its downloaded snapshot, without pickles or code."""
    folder = Path(model)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{model}: neither a folder here nor to be had from the hub ({reason})") from error
