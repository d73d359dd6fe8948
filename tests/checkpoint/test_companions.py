"""What belongs to a checkpoint arrives in its copy, with a tokenizer that does the same; nothing else does."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from pyprune import InputError
from pyprune.calibration.tokenizer_check import check_tokenizer
from pyprune.checkpoint.auxiliary_files import companions, copy_companions
from pyprune.checkpoint.belongings import chosen_by_name, imported_by, modules_of
from pyprune.errors import VerificationError

OWN_CODE = """
from transformers import LlamaTokenizerFast as Base
from .own_tables import PREFIX


class OwnTokenizer(Base):
    vocab_files_names = {"vocab_file": "words.of.mine", "tokenizer_file": "tokenizer.json"}

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.prefix = PREFIX
"""


@pytest.fixture
def source(demo_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for file in demo_model.glob("*.json"):
        if file.name not in ("model.safetensors.index.json", "training.json"):
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def listing(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "vocab.json",
            "vocab.txt",
            "vocab.bpe",
            "merges.txt",
            "spiece.model",
            "sentencepiece.bpe.model",
            "tokenizer.v3",
        ),
        *("source.spm", "target.spm", "qwen.tiktoken", "bpe.codes", "dict.txt", "entity_vocab.json", "tekken.json"),
        *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "rag.jinja"),
        *("additional_chat_templates/tools.jinja", "preprocessor_config.json", "video_preprocessor_config.json"),
        *("processor_config.json", "generation_config.json", "LICENSE", "LICENCE.md", "license.txt", "Copying"),
        *("NOTICE", "Notice.txt", "USE_POLICY.md", "use-policy.txt", "LLAMA_LICENSE", "THIRD_PARTY_NOTICES"),
    ],
)
def test_names_that_belong_to_any_checkpoint(name: str) -> None:
    assert chosen_by_name({name}) == {name}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "config.json",
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
            "consolidated.00.pth",
        ),
        *("tokenizer.py", "modeling_x.py", "license.py", "plan.json", "report.html", "README.md", ".gitattributes"),
        *("original/tokenizer.model", "onnx/tokenizer.json", ".cache/tokenizer.json", "/tokenizer.json", "../LICENSE"),
        *("tokenizer.safetensors", "vocab.gguf", "other_templates/x.jinja", "additional_chat_templates/x.txt"),
    ],
)
def test_names_that_do_not(name: str) -> None:
    assert chosen_by_name({name}) == set()


def test_modules_are_those_of_the_tokenizer_and_of_this_checkpoint() -> None:
    assert modules_of({"AutoTokenizer": ["slow.Slow", "fast.Fast"], "AutoModel": "model.Model"}) == {
        "slow.py",
        "fast.py",
    }
    assert modules_of({"AutoTokenizer": ["org/other--slow.Slow", None]}) == set()
    assert modules_of(["slow.Slow", None]) == {"slow.py"}
    assert modules_of({"AutoTokenizer": "slow.Slow"}) == {"slow.py"}
    for odd in (None, 5, "", "x", {}, {"AutoTokenizer": None}, {"AutoTokenizer": [["a.B"]]}):
        assert modules_of(odd) <= {"a.py"}
    code = "from .one import x\nimport .two\n  from .three import (y)\n"
    code += "from . import four, five as six\nimport os\nfrom a.b import c"
    assert imported_by("m.py", code) == {"one.py", "two.py", "three.py", "four.py", "five.py"}
    assert imported_by("folder/m.py", "from .one import x") == {"folder/one.py"}


def test_a_tokenizer_with_code_of_its_own_is_whole(source: Path, target: Path) -> None:
    (source / "own_code.py").write_text(OWN_CODE)
    (source / "own_tables.py").write_text("from .own_deep import PREFIX\n")
    (source / "own_deep.py").write_text("PREFIX = 'p'\n")
    (source / "modeling_own.py").write_text("raise SystemExit\n")
    (source / "words.of.mine").write_text("words")
    (source / "table.of.settings").write_text("words")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "loud.jinja").write_text("{{ messages[0].content | upper }}")
    (source / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    auto_map = {"AutoTokenizer": [None, "own_code.OwnTokenizer"], "AutoModel": "modeling_own.Own"}
    change(source / "tokenizer_config.json", auto_map=auto_map, table=["table.of.settings"])
    assert copy_companions(source, target) == []
    assert listing(target) == listing(source) - {"config.json", "modeling_own.py"}
    shutil.copyfile(source / "config.json", target / "config.json")
    tokenizer = AutoTokenizer.from_pretrained(target, trust_remote_code=True)
    assert (type(tokenizer).__name__, tokenizer.prefix) == ("OwnTokenizer", "p")
    assert (check_tokenizer(source, target, True) or "").endswith("2 chat templates")
    # Without leave to run code transformers reads tokenizer.json alone.
    assert (check_tokenizer(source, target, False) or "").endswith("2 chat templates")
    shutil.copytree(source, target.parent / "broken")
    (target.parent / "broken" / "tokenizer.json").write_text("{")
    assert "not compared" in (check_tokenizer(target.parent / "broken", target, False) or "")

    (target / "additional_chat_templates" / "loud.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(VerificationError, match="chat template loud renders"):
        check_tokenizer(source, target, True)
    (target / "own_deep.py").unlink()
    with pytest.raises(VerificationError, match="loads no longer"):
        check_tokenizer(source, target, True)


def test_a_tokenizer_that_encodes_otherwise_is_found(source: Path, target: Path, tmp_path: Path) -> None:
    copy_companions(source, target)
    shutil.copyfile(source / "config.json", target / "config.json")
    assert "the same" in (check_tokenizer(source, target, False) or "")
    description = json.loads((target / "tokenizer.json").read_text())
    for changed in (
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Lowercase"}},
        {
            "added_tokens": [
                *description["added_tokens"],
                dict(description["added_tokens"][0], id=9000, content="<new>"),
            ]
        },
    ):
        (target / "tokenizer.json").write_text(json.dumps(description | changed))
        with pytest.raises(VerificationError, match="differs"):
            check_tokenizer(source, target, False)
    (target / "tokenizer.json").unlink()
    with pytest.raises(VerificationError):
        check_tokenizer(source, target, False)
    (tmp_path / "none").mkdir()
    assert check_tokenizer(tmp_path / "none", target, False) is None


def test_links_that_lead_outside_are_left_out(source: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "id_rsa").write_text("PRIVATE KEY")
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "x.jinja").write_text("PRIVATE KEY")
    (source / "NOTICE").symlink_to("../id_rsa")
    (source / "vocab.txt").symlink_to(tmp_path / "id_rsa")
    (source / "additional_chat_templates").symlink_to(tmp_path / "templates")
    (source / "real").write_text("licence")
    (source / "LICENSE").symlink_to("real")
    (source / "COPYING").symlink_to("nowhere")
    os.mkfifo(source / "merges.txt")
    warnings = copy_companions(source, target)
    left = {"NOTICE", "vocab.txt", "additional_chat_templates/x.jinja", "COPYING", "merges.txt"}
    assert len(warnings) == len(left)
    assert all(any(f"{source / name}: " in warning for warning in warnings) for name in left)
    assert not left & listing(target)
    assert (target / "LICENSE").read_text() == "licence"
    assert not (target / "LICENSE").is_symlink()
    assert "PRIVATE KEY" not in "".join(file.read_text() for file in target.rglob("*") if file.is_file())


def test_a_link_of_code_that_leads_outside_is_not_read(source: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("'secret.words'")
    (source / "own.py").symlink_to("../code.py")
    (source / "secret.words").write_text("")
    change(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    (warning,) = copy_companions(source, target)
    assert "own.py" in warning
    assert not {"own.py", "secret.words"} & listing(target)


@pytest.mark.parametrize("text", ["", "[" * 100_000, "[]", '{"auto_map": 5}', '{"auto_map": {"AutoTokenizer": [5]}}'])
def test_damaged_settings_are_copied_as_they_are(text: str, source: Path, target: Path) -> None:
    (source / "tokenizer_config.json").write_text(text)
    assert copy_companions(source, target) == []
    assert (target / "tokenizer_config.json").read_text() == text


def test_modes_are_those_of_new_files_and_hostile_names_stay(source: Path, target: Path) -> None:
    (source / "LICENSE").write_text("x")
    (source / "LICENSE").chmod(0o777)
    change(
        source / "tokenizer_config.json", a="config.json", b="../x", c="/etc/passwd", d="model.safetensors", e="x.py"
    )
    for name in ("model.safetensors", "x.py"):
        (source / name).write_text("")
    copy_companions(source, target)
    assert not {"config.json", "model.safetensors", "x.py"} & listing(target)
    (target / "new").touch()
    assert (target / "LICENSE").stat().st_mode == (target / "new").stat().st_mode


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        companions(tmp_path / "nothing")
