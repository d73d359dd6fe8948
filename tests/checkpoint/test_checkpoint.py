"""Reading refuses every broken checkpoint with one line; writing is whole or not at all and resumes."""

import errno
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyprune.checkpoint import CheckpointReader, CheckpointWriter, begun, check_disk_space, checkpoint_folder
from pyprune.checkpoint.headers import StoredTensor, read_header
from pyprune.checkpoint.journal import journal_line
from pyprune.checkpoint.unfinished import restore
from pyprune.errors import InputError, VerificationError


@pytest.fixture
def folder(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that a test may break: Llama in shards of one layer."""
    target = tmp_path / "model"
    shutil.copytree(tiny_checkpoint(family="llama", shard_layers=1, dtype="bfloat16"), target)
    return target


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        CheckpointReader(folder)
    assert "\n" not in str(refusal.value)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def test_reads_every_tensor_as_stored(folder: Path) -> None:
    reader = CheckpointReader(folder)
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    read = reader.read(reader.outside_layers())
    for layer in range(reader.layers):
        read |= {reader.layer_prefix(layer) + n: t for n, t in reader.read_layer(layer).items()}
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], stored[name]) for name in stored)
    ids = torch.tensor([[5, 1], [0, 5]])
    assert torch.equal(reader.embed(ids), stored["model.embed_tokens.weight"][ids])
    assert reader.bytes == sum(t.nbytes for t in stored.values())


def test_fingerprint_follows_the_weights(folder: Path, tmp_path: Path) -> None:
    first = CheckpointReader(folder).fingerprint()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert CheckpointReader(copy).fingerprint() == first
    for name in CheckpointReader(copy).tensors:  # one tensor changed at a time, each must be seen
        file = shard_of(copy, name)
        original, tensors = file.read_bytes(), load_file(file)
        save_file(tensors | {name: tensors[name] * 2}, file, metadata={"format": "pt"})
        assert CheckpointReader(copy).fingerprint() != first, name
        file.write_bytes(original)


def test_missing_folder_and_config(folder: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "nowhere: no such folder")
    refuse(tmp_path, "no config.json there")
    (folder / "config.json").write_text("{")
    refuse(folder, "config.json: not valid JSON")
    (folder / "config.json").write_text("[]")
    refuse(folder, "config.json: not a model's configuration")


def test_broken_index(folder: Path) -> None:
    for text in ("[]", "{", '{"weight_map": 3}'):
        (folder / "model.safetensors.index.json").write_text(text)
        refuse(folder, "not a safetensors index|not valid JSON")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "unknown architecture 'gpt2' .*the nearest is llama; `pyprune families`"),
        ({"model_type": None}, "not a model's configuration: an object with a model_type is needed"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised checkpoint cannot be pruned"),
        (
            {"hidden_size": 96},
            r"tensor model.embed_tokens.weight has shape \[\d+, 64\], but config.json calls for",
        ),
        ({"num_hidden_layers": 0}, "transformers refuses this configuration: num_hidden_layers is 0"),
        ({"num_key_value_heads": 0}, "transformers refuses this configuration"),
        ({"head_dim": 0}, "transformers refuses this configuration"),
        ({"hidden_act": "swoosh"}, "transformers refuses this configuration"),
        ({"model_type": ["llama"]}, "not a model's configuration"),
        ({"num_hidden_layers": 4}, r"tensor model.layers.3.\S+ is missing"),
        ({"num_hidden_layers": 2}, r"tensor model.layers.2.\S+ is not part of a llama model"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"intermediate_size": "many"}, "transformers refuses this configuration"),
        ({"attention_bias": True}, r"tensor model.layers.0.self_attn.q_proj.bias is missing"),
    ],
)
def test_configuration_that_does_not_fit(folder: Path, changes: dict[str, object], message: str) -> None:
    edit_config(folder, **changes)
    refuse(folder, message)


def test_missing_shard_and_tensor(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    file = shard_of(folder, name)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    refuse(folder, f"tensor {name} is missing")
    file.unlink()
    refuse(folder, f"{file.name}: listed in model.safetensors.index.json but missing")


def test_truncated_file_names_file_and_tensor(folder: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    file = shard_of(folder, name)
    with file.open("rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        offsets = {k: v["data_offsets"] for k, v in json.loads(f.read(length)).items() if k != "__metadata__"}
    first_cut = min((v for v in offsets.values() if v[1] > offsets[name][0] + 10), key=lambda v: v[1])
    cut_name = next(k for k, v in offsets.items() if v == first_cut)
    os.truncate(file, 8 + length + offsets[name][0] + 10)
    refuse(folder, f"{file.name}: truncated: tensor {cut_name} ends at byte")
    os.truncate(file, 5)
    refuse(folder, f"{file.name}: not a complete safetensors file")


def test_wrong_shape_and_type(folder: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    file = shard_of(folder, name)
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, file)
    refuse(folder, rf"{file.name}: tensor {name} has shape \[159, 64\], but config.json calls for \[160, 64\]")
    save_file(tensors | {name: tensors[name].to(torch.int8)}, file)
    refuse(folder, f"tensor {name} is stored as I8")


def test_pickles_are_never_loaded(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "trapped"),))

    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    refuse(folder, "only pickled weights there, which are never loaded")
    assert not (tmp_path / "trapped").exists()


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nobody/no-such-model: neither a folder here nor to be had from the hub"):
        checkpoint_folder("nobody/no-such-model")


# --- the writer ---

IDENTITY = {"ratio": 0.3, "method": "flap"}


def writer(output: Path, resume: bool = False, **changes: object) -> CheckpointWriter:
    made = CheckpointWriter(output, IDENTITY | changes, resume)
    made.begin()
    return made


def laid_out(
    output: Path, *parts: dict[str, torch.Tensor], shard_size: int = 1, resume: bool = False
) -> CheckpointWriter:
    """A writer of these parts, each tensor in a file of its own unless a size is given."""
    made = writer(output, resume)
    made.lay_out(parts, shard_size)
    return made


def file_of(w: CheckpointWriter, name: str) -> Path:
    return w.plan.tensors[name].file


def test_output_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    a, b = torch.arange(6.0).reshape(2, 3).T, torch.ones(4, dtype=torch.bfloat16)
    w = laid_out(output, {"a": a}, {"b": b})
    w.write(0, {"a": a})
    with pytest.raises(RuntimeError, match=r"parts \[1\]"):
        w.write_index()
    w.write(1, {"b": b})
    assert not output.exists()
    w.write_index()
    w.finish()
    assert not w.partial.exists()
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 32},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    assert torch.equal(load_file(output / index["weight_map"]["a"])["a"], a)
    assert sorted(p.name for p in output.iterdir()) == sorted(
        [*set(index["weight_map"].values()), "model.safetensors.index.json"]
    )
    mask = os.umask(0)
    os.umask(mask)
    assert (output / index["weight_map"]["a"]).stat().st_mode & 0o777 == 0o666 & ~mask


def test_one_file_has_no_index(tmp_path: Path) -> None:
    w = laid_out(tmp_path / "out", {"a": torch.ones(3)}, {"b": torch.ones(4)}, shard_size=28)
    w.write(1, {"b": torch.ones(4)})
    w.write(0, {"a": torch.ones(3)})
    w.write_index()
    w.finish()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == {"a", "b"}


def test_resume_keeps_what_is_done_and_drops_what_is_half_done(tmp_path: Path) -> None:
    parts = {"a": torch.ones(3)}, {"b": torch.ones(3)}
    w = laid_out(tmp_path / "out", *parts)
    w.write(0, {"a": torch.ones(3)}, record={"kept": [1, 2]})
    w.write(1, {"b": torch.ones(3)})
    w.flush()
    journal = w.partial / "journal.jsonl"
    with pytest.raises(InputError, match="an unfinished run; add --resume"):
        CheckpointWriter(tmp_path / "out", IDENTITY, resume=False)
    w.close()
    os.truncate(journal, journal.stat().st_size - 5)  # killed in the middle of the last line
    again = laid_out(tmp_path / "out", *parts, resume=True)
    assert again.done.keys() == {0}
    assert again.done[0]["record"] == {"kept": [1, 2]}
    again.close()
    os.truncate(file_of(again, "a"), 10)  # and a file whose bytes never reached the disk
    for text in (None, ""):
        if text is not None:
            journal.write_text(text)
        once_more = laid_out(tmp_path / "out", *parts, resume=True)
        assert once_more.done == {}
        once_more.close()


def test_a_part_whose_bytes_changed_does_not_count(tmp_path: Path) -> None:
    """Nor do others in its file suffer."""
    first = {"a": torch.ones(300), "b": torch.ones(2, 0)}
    parts = first, {"c": torch.ones(3)}
    w = laid_out(tmp_path / "out", *parts, shard_size=10_000)
    w.write(0, dict(first))
    w.write(1, {"c": torch.ones(3)})
    w.flush()
    w.close()
    damage(w, "a")
    again = laid_out(tmp_path / "out", *parts, shard_size=10_000, resume=True)
    assert again.done.keys() == {1}
    again.write(0, dict(first))
    assert again.prove().keys() == {"a", "b", "c"}
    damage(w, "c")
    with pytest.raises(VerificationError, match="tensor c is not what was written"):
        again.prove()


def damage(w: CheckpointWriter, name: str) -> None:
    with file_of(w, name).open("r+b") as f:
        f.seek(w.plan.tensors[name].offset + 5)
        f.write(b"x")


def test_an_unfinished_run_of_another_version(tmp_path: Path) -> None:
    """The first one's journal named no format, and had a file a layer."""
    (tmp_path / "out.partial").mkdir()
    head = {"identity": IDENTITY, "source": {}}
    (tmp_path / "out.partial" / "journal.jsonl").write_text(journal_line(head))
    said = f"{tmp_path / 'out.partial'}: begun by another version of pyprune; delete that folder to start anew"
    for look in (lambda: writer(tmp_path / "out", resume=True), lambda: begun(tmp_path / "out")):
        with pytest.raises(InputError, match=re.escape(said)):
            look()


@pytest.mark.parametrize("what", ["resume", "prove"])
def test_a_limit_of_the_system_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Too many open files: nothing that was finished is made anew for it, and no output is said to be damaged."""
    w = laid_out(tmp_path / "out", {"a": torch.ones(3)})
    w.write(0, {"a": torch.ones(3)})
    w.flush()
    module = "unfinished" if what == "resume" else "content"

    def limited(file: Path) -> dict[str, StoredTensor]:
        with no_more_open_files():
            return read_header(file)

    monkeypatch.setattr(f"pyprune.checkpoint.{module}.read_header", limited)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EMFILE))) as refused:
        restore(w.partial, w.head) if what == "resume" else w.prove()
    assert refused.value.errno == errno.EMFILE
    assert str(refused.value.filename).startswith(str(w.partial))


@contextmanager
def no_more_open_files() -> Iterator[None]:
    """No more than there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_one_run_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    """Whoever comes second is told so and removes nothing; what came into being meanwhile is not replaced."""
    parts = {"0": torch.ones(3)}, {"1": torch.ones(3)}
    first = laid_out(tmp_path / "out", *parts)
    for resume in (True, False):
        with pytest.raises(InputError, match="another run is at work there" if resume else "an unfinished run"):
            CheckpointWriter(tmp_path / "out", IDENTITY, resume)
    late = CheckpointWriter(tmp_path / "other", IDENTITY, resume=False)
    other = writer(tmp_path / "other")
    with pytest.raises(InputError, match="another run began there just now"):
        late.begin()
    late.discard()
    assert other.partial.is_dir()
    for part in (0, 1):
        first.write(part, dict(parts[part]))
    first.write_index()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(InputError, match="came into being meanwhile"):
        first.finish()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]
    first.close()
    (tmp_path / "out" / "mine").unlink()
    (tmp_path / "out").rmdir()
    again = laid_out(tmp_path / "out", *parts, resume=True)
    again.write_index()
    again.finish()
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"0": torch.ones(3)}, {"1": torch.ones(3)}
    w, fsync, synced = laid_out(tmp_path / "out", *parts), os.fsync, []

    def watched(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    for part in (0, 1):
        w.write(part, dict(parts[part]))
    w.write_index()
    (w.partial / "additional").mkdir()
    for name in ("config.json", "additional/template.jinja"):
        (w.partial / name).write_text("{}")
    monkeypatch.setattr(os, "fsync", watched)
    w.finish()
    inside = {str(w.partial / p.relative_to(w.output)) for p in w.output.rglob("*")} | {str(w.partial)}
    assert inside <= set(synced)
    assert synced[-1] == str(tmp_path)


def test_resume_with_other_settings_says_which(tmp_path: Path) -> None:
    writer(tmp_path / "out").close()
    with pytest.raises(InputError, match=r"cannot resume with other settings: ratio \(was 0.3, now 0.5\)"):
        CheckpointWriter(tmp_path / "out", IDENTITY | {"ratio": 0.5}, resume=True)


def test_output_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="exists and is not an empty folder"):
            CheckpointWriter(taken, IDENTITY, resume=False)
    with pytest.raises(InputError, match="is not a folder that can be written"):
        CheckpointWriter(tmp_path / "file" / "out", IDENTITY, resume=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="cannot be replaced; name a new folder inside it"):
        CheckpointWriter(Path("."), IDENTITY, resume=False)
    with pytest.raises(InputError, match="too long a name"):
        CheckpointWriter(tmp_path / ("x" * 250), IDENTITY, resume=False)
    (tmp_path / "way.partial").write_text("a file")
    with pytest.raises(InputError, match="is in the way"):
        CheckpointWriter(tmp_path / "way", IDENTITY, resume=True)
    (tmp_path / "torn.partial").mkdir()
    (tmp_path / "torn.partial" / "journal.jsonl").write_text("not JSON\n")
    with pytest.raises(InputError, match="not a journal of pyprune"):
        CheckpointWriter(tmp_path / "torn", IDENTITY, resume=True)
    (tmp_path / "target").mkdir()
    (tmp_path / "empty").symlink_to(tmp_path / "target")
    w = laid_out(tmp_path / "empty", {"a": torch.ones(1)}, {"b": torch.ones(1)})
    w.write(0, {"a": torch.ones(1)})
    w.write(1, {"b": torch.ones(1)})
    w.write_index()
    w.finish()
    assert (tmp_path / "empty" / "model.safetensors.index.json").exists()


def test_no_space_is_said_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"MB free, the output needs 1000000000000.0 MB"):
        check_disk_space(tmp_path / "out", 10**18)
    check_disk_space(tmp_path / "out", 1)


def test_a_full_disk_is_an_enospc_error_and_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        w = laid_out(disk / "out", {"a": torch.ones(1000)}, {"b": torch.ones(200_000)}, shard_size=10**6)
        w.write(0, {"a": torch.ones(1000)})
        w.write(1, {"b": torch.ones(200_000)})
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.ENOSPC))) as full:
            w.flush()
        assert full.value.errno == errno.ENOSPC
        assert full.value.filename == str(file_of(w, "b"))
        w.close()
        again = CheckpointWriter(disk / "out", IDENTITY, resume=True)
        assert again.done.keys() == {0}
        again.close()
    finally:
        subprocess.run(["umount", disk], check=True)
