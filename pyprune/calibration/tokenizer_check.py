"""The proof of a copied tokenizer: it encodes and renders as the one that it was copied from."""

from pathlib import Path
from typing import Any

from ..checkpoint import ModelInMemory
from ..errors import InputError, VerificationError
from ..runtime.files import read_json, write_json
from .text import load_tokenizer, refused_by_tokenizers

# Scripts, digits, runs of spaces and line ends, what looks like markup, emoji of several code points, lone controls.
SAMPLE = (
    "The quick brown fox doesn't jump; it's 3.14159 and 1,234,567 times lazier!\n\n\tdef f(x):\n        return x**2\r\n"
    "   three spaces, trailing  \n\n\n"
    "Größe café naïve Ångström ŒUVRE ﬁ  e\u0301  Ελληνικά  Русский текст  עברית  العربية  हिन्दी  ไทย  한국어"
    " 日本語のテスト  中文，标点。"
    " 👩‍👩‍👧‍👦 🇩🇪 ✈️ 🏽 \u200b\u00a0\u2028 \x07 ∑∂√ <b>&amp;</b> [INST] <|im_start|> {{ x }} https://example.org/?q=1#a"
)
_MESSAGES = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "  Thank you 🙂\n"},
)
NOT_COMPARED = "not compared"  # begins the line of a tokenizer that does not load
_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def check_tokenizer(source: Path | ModelInMemory, output: Path, trust_remote_code: bool) -> str | None:
    """Whether the tokenizer in `output` does what the one in `source` does, on a text and some messages.

    Returns None where `source` has no tokenizer, else in a line what was compared, or why nothing could be: the
    source's own does not load. VerificationError: with the first difference.
    """
    if not _has_tokenizer(source):
        return None
    try:
        expected = load_tokenizer(source, trust_remote_code)
    except InputError as error:
        return f"{NOT_COMPARED}: {error}"
    try:
        found = load_tokenizer(output, trust_remote_code)
    except InputError as error:
        raise VerificationError(f"the tokenizer of {source} was copied, but loads no longer: {error}") from error
    own = type(expected).__module__.startswith("transformers.")  # not code that came with the checkpoint
    if own and type(found) is not type(expected):
        found = _with_class(output, type(expected).__name__, trust_remote_code)
    try:
        with refused_by_tokenizers("its tokenizer cannot encode a text"):
            expected(SAMPLE)
    except InputError as error:
        return f"{NOT_COMPARED}: {error}"
    tokens = _check_text(source, output, expected, found)
    templates = _check_templates(source, output, expected, found)
    return f"{type(expected).__name__}: the same {tokens} tokens, {templates} chat templates"


def _has_tokenizer(source: Path | ModelInMemory) -> bool:
    if isinstance(source, ModelInMemory):
        return source.tokenizer is not None
    return any(file.is_file() for pattern in _FILES for file in source.glob(pattern))


def _with_class(output: Path, name: str, trust_remote_code: bool) -> Any:
    """The tokenizer of `output` as that class, which its tokenizer_config.json names from now on.

    transformers goes by the model's type, and takes the class that the file names for some types only: the copy of a
    tokenizer beside a pruned model's type would be of another class, and encode in another way.
    """
    file = output / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    write_json(settings | {"tokenizer_class": name}, file)
    return load_tokenizer(output, trust_remote_code)


def _check_text(source: object, output: Path, expected: Any, found: Any) -> int:
    special = [str(token) for token in expected.all_special_tokens]
    text = SAMPLE + "".join(f"{token} a{token}" for token in special)
    for special_tokens in (False, True):
        ids, other = (
            each(text, add_special_tokens=special_tokens, verbose=False).input_ids for each in (expected, found)
        )
        if ids != other:
            first = next((i for i, pair in enumerate(zip(ids, other, strict=False)) if pair[0] != pair[1]), None)
            where = f"{len(other)} tokens of a text instead of {len(ids)}"
            if first is not None:
                where = f"token {first} of a text is {other[first]} instead of {ids[first]}"
            raise _differs(source, output, where)
    if expected.special_tokens_map != found.special_tokens_map:
        raise _differs(source, output, f"special tokens {found.special_tokens_map} not {expected.special_tokens_map}")
    if len(expected) != len(found):
        raise _differs(source, output, f"{len(found)} entries instead of {len(expected)}")
    return len(ids)


def _check_templates(source: object, output: Path, expected: Any, found: Any) -> int:
    templates = expected.chat_template
    names = [None] if isinstance(templates, str) else sorted(templates or {})
    for name in names:
        wanted, got = (_rendered(each, name) for each in (expected, found))
        if wanted != got:
            raise _differs(source, output, f"chat template {name or 'default'} renders {got!r} instead of {wanted!r}")
    if type(templates) is not type(found.chat_template):
        raise _differs(source, output, "other chat templates")
    return len(names)


def _rendered(tokenizer: Any, name: str | None) -> str:
    """What a template makes of the messages; its complaint, where it takes no such messages."""
    template = tokenizer.chat_template
    if name is not None:
        template = template.get(name, "") if isinstance(template, dict) else ""
    try:
        return str(
            tokenizer.apply_chat_template(
                list(_MESSAGES), chat_template=template or "", tokenize=False, add_generation_prompt=True
            )
        )
    except Exception as error:  # Jinja's errors, and whatever a template raises by itself
        return f"{type(error).__name__}: {error}"


def _differs(source: object, output: Path, what: str) -> VerificationError:
    return VerificationError(f"{output}: its tokenizer differs from the one of {source}: {' '.join(what.split())}")
