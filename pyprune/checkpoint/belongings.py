"""Select a checkpoint's auxiliary files by their names and by the tokenizer's settings.

The same choice is made of a folder that is copied and of a repository that is downloaded.
"""

import re
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

TEMPLATES = "additional_chat_templates"

# Vocabulary, merges and settings, by the names that the tokenizers of transformers have given them.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "*vocab.json",
    "*vocab.txt",
    "merges*",
    "*.model",
    "*.tiktoken",
    "*.bpe",
    "*.spm",
    "*.tokenizer",
    "bpe.codes",
    "dict.txt",
    "tekken.json",
    "normalizer.json",
    "emoji.json",
    "byte_maps.json",
    "word_shape.json",
    "word_pronunciation.json",
    "*.jinja",
    "chat_template*",
    f"{TEMPLATES}/*.jinja",
)
_SETTINGS = ("generation_config.json", "*preprocessor_config.json", "processor_config.json")
_LEGAL = re.compile(r".*licen[cs]e.*|copying.*|copyright.*|.*notice.*|.*use[ _-]?policy.*", re.IGNORECASE)
# Never a companion, whatever its name: weights, and what every checkpoint writes anew.
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz", ".index.json")
_WRITTEN = ("config.json", "plan.json", "report.html", "README.md", "run.yaml")


def chosen_by_name(names: Collection[str]) -> set[str]:
    """Choose the names (relative to the checkpoint's folder) that belong to any checkpoint."""
    return {name for name in names if _may_belong(name) and _is_named_so(name)}


def _is_named_so(name: str) -> bool:
    if any(_matches(name, pattern) for pattern in (*_TOKENIZER, *_SETTINGS)):
        return not name.endswith(".py")
    return "/" not in name and not name.endswith(".py") and _LEGAL.fullmatch(name) is not None


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _may_belong(name: str) -> bool:
    """Not so are weights, what is written anew, what lies outside, and what is hidden."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return not (hidden or path.is_absolute() or name in _WRITTEN or name.lower().endswith(_WEIGHTS))


def chosen_by_tokenizer(names: Collection[str], tokenizer_config: Any) -> set[str]:
    """Choose the names that a tokenizer_config.json has as values, and those that its tokenizer class reads."""
    if not isinstance(tokenizer_config, dict):
        return set()
    named = {text for text in _strings(tokenizer_config) if not text.endswith(".py")}
    named.update(_names_of_class(tokenizer_config.get("tokenizer_class")))
    return {name for name in names if name in named and _may_belong(name)}


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON document; by a stack, since a file may be nested deeper than Python recurses."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _names_of_class(name: Any) -> set[str]:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    try:
        files = tokenizer_class_from_name(name).vocab_files_names.values()
    except Exception:  # no such class here, or one whose libraries are not installed
        return set()
    return {file for file in files if isinstance(file, str)}


def modules_of(auto_map: Any) -> set[str]:
    """The files of this checkpoint with a tokenizer's Python code, by the `auto_map` of a configuration.

    It names `module.Class`, one for the slow and one for the fast tokenizer, or `repository--module.Class`: that is
    another's and stays there.
    """
    found = set()
    if isinstance(auto_map, dict):  # in old files it is the tokenizer's alone
        auto_map = auto_map.get("AutoTokenizer")
    for reference in _strings(auto_map):
        module, _, name = reference.rpartition(".")
        if module and name and "--" not in reference:
            found.add(f"{module}.py")
    return found


def imported_by(module: str, code: str) -> set[str]:
    """The files that a module of a checkpoint imports relatively, as transformers looks for them."""
    found = re.findall(r"^\s*(?:import|from)\s+\.([\w.]+)", code, re.MULTILINE)
    for names in re.findall(r"^\s*from\s+\.\s+import\s+([\w, \t]+)", code, re.MULTILINE):
        found += [name.split()[0] for name in names.split(",") if name.strip()]
    folder = PurePosixPath(module).parent
    return {str(folder / f"{name}.py") for name in found}


def chosen_by_code(names: Collection[str], code: str) -> set[str]:
    """Choose the names that a tokenizer's code has as a string: its vocabulary may have any name."""
    return {name for name in names if _may_belong(name) and (f'"{name}"' in code or f"'{name}'" in code)}
