"""Files of a checkpoint beside weights and config.json: tokenizer, generation settings, licence."""

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..runtime.files import read_json, reason_of
from .belongings import chosen_by_code, chosen_by_name, chosen_by_tokenizer, imported_by, modules_of
from .links import stays_inside


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy them from one folder to another.

    Returns what the user should know: links that are not followed, since they lead out of the folder, and code of the
    tokenizer that is missing. InputError: one cannot be read.
    """
    warnings = []
    for name in sorted(companions(source)):
        file = source / name
        if not stays_inside(source, file):
            warnings.append(f"{file}: a link that leads outside its folder: left out")
            continue
        if not file.is_file():
            warnings.append(f"{file}: not a file: left out")
            continue
        try:
            file.open("rb").close()
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {reason_of(error)}") from error
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)
    return warnings


def companions(folder: Path) -> set[str]:
    """Their names, relative to the folder; of links too that are not to be followed."""
    return companions_of(_listing(folder), lambda name: _readable(folder, name))


def companions_of(names: Collection[str], path_of: Callable[[str], Path | None]) -> set[str]:
    """Select the names of a checkpoint's files that belong to it.

    `path_of` gives where one of them can be read, or None: those with the tokenizer's settings and code are looked at.
    """
    settings = _document(names, path_of, "tokenizer_config.json")
    found = chosen_by_name(names) | chosen_by_tokenizer(names, settings)
    auto_maps = [settings.get("auto_map"), _document(names, path_of, "config.json").get("auto_map")]
    waiting = {module for auto_map in auto_maps for module in modules_of(auto_map)} & set(names)
    while waiting:
        module = waiting.pop()
        found.add(module)
        path = path_of(module)
        if path is not None:
            code = path.read_text(encoding="utf-8", errors="replace")
            found |= chosen_by_code(names, code)
            waiting |= (imported_by(module, code) & set(names)) - found
    return found


def _document(names: Collection[str], path_of: Callable[[str], Path | None], name: str) -> dict[str, Any]:
    """Empty for one that is damaged: it belongs to the checkpoint all the same, and who loads it will say."""
    path = path_of(name) if name in names else None
    try:
        document = {} if path is None else read_json(path)
    except InputError:
        return {}
    return document if isinstance(document, dict) else {}


def _listing(folder: Path) -> set[str]:
    """Files of the folder and of the folders in it, links among them; deeper no companion lies."""
    names = set()
    for entry in _entries(folder):
        if not entry.is_dir():
            names.add(entry.name)
        elif not entry.name.startswith("."):
            names.update(f"{entry.name}/{inside.name}" for inside in _entries(entry) if not inside.is_dir())
    return names


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder}: cannot be read: {reason_of(error)}") from error


def _readable(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if stays_inside(folder, path) and path.is_file() else None
