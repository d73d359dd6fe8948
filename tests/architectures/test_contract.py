"""The contract of every family, on a small random model of it: what is pruned computes what it should.

A family that is declared is tested; support/family_models.py may have a configuration for it.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.contract import (
    IDS,
    RATIO,
    REFITTED,
    WINDOWS,
    Subject,
    assert_same,
    loaded,
    logits,
    refitted_naively,
)
from support.family_models import LIKE_LLAMA
from support.gguf_models import add_tokenizer
from support.written import checkpoint_bytes, checkpoint_tensors

import pyprune
from pyprune.architectures import FAMILIES, SUBLAYERS
from pyprune.checkpoint import CheckpointReader, CheckpointWriter
from pyprune.evaluation import logits_worker
from pyprune.evaluation.roundtrip import layered_logits
from pyprune.forward.forward_check import check_forward, layer_kinds
from pyprune.forward.layer_forward import LayerForward
from pyprune.integrations.vllm import MODELS
from pyprune.modeling import PRUNED_CLASSES

CPU, FLOAT32 = torch.device("cpu"), torch.float32
DAMPING = 0.01  # what obs and slimgpt take unless told otherwise


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    made: dict[str, Subject] = {}

    def subject_of(name: str) -> Subject:
        if name not in made:
            made[name] = Subject.made(FAMILIES[name], tmp_path_factory.mktemp(name))
        return made[name]

    return subject_of


@pytest.fixture(scope="module", params=list(FAMILIES))
def subject(request: pytest.FixtureRequest, subject_of: Callable[[str], Subject]) -> Subject:
    return subject_of(request.param)


def test_layers_one_by_one_are_the_model(subject: Subject) -> None:
    assert_same(layered_logits(subject.reader, IDS), logits(subject.model), "logits of the layer-by-layer forward")
    check_forward(subject.reader, WINDOWS, CPU, FLOAT32)


@torch.no_grad()
def test_sublayers_in_turn_are_the_layer(subject: Subject) -> None:
    forward = LayerForward(subject.reader, WINDOWS[:2], CPU, FLOAT32)
    for layer in layer_kinds(subject.reader):
        block = forward.build(subject.reader.stream_layer(layer), layer)
        whole, in_turn = forward.embed(), forward.embed()
        forward.run(block, layer, whole, {})
        for sublayer in SUBLAYERS:
            for part in in_turn.micro_batches():
                forward.step(block, layer, sublayer, part)
        assert_same(in_turn.data, whole.data, f"layer {layer}: its sublayers and itself")


@pytest.mark.parametrize("sizes", ["adaptive", "uniform"])
def test_pruned_is_masked(subject: Subject, sizes: str) -> None:
    """Without compensation it is the dense model with the removed units' columns of the output projections at zero."""
    output: Path = getattr(subject, sizes)
    found = loaded(output, attn_implementation=subject.family.attention_backend)
    if sizes == "uniform":
        assert type(found).__module__.startswith("transformers."), f"{type(found).__name__} is no stock class"
    assert_same(logits(found), logits(subject.masked(output)), "logits of the pruned and of the masked model")


def test_one_key_value_head_in_a_fused_matrix(tmp_path: Path) -> None:
    """It stays with its query heads; the FFN is pruned."""
    subject = Subject.made(FAMILIES["phi3"], tmp_path, num_key_value_heads=1)
    assert_same(logits(loaded(subject.adaptive)), logits(subject.masked(subject.adaptive)), "pruned and masked")


@torch.no_grad()
def test_refit_is_least_squares(subject: Subject) -> None:
    """Each output projection in turn, with what was written in place before it."""
    output, model, family = subject.refitted, subject.dense(), subject.family
    written = checkpoint_tensors(output)
    for layer, kept in enumerate(subject.kept(output)):
        for sublayer in subject.reader.shapes[layer].sublayers:
            projection, columns = subject.output_proj(model, layer, sublayer), subject.columns(kept, layer, sublayer)
            prefix, after = (
                subject.reader.layer_prefix(layer),
                family.wiring_of(subject.reader.config).norm_after(sublayer),
            )
            norm = None if after is None else model.get_submodule(prefix + after)
            expected = refitted_naively(model, projection, norm, columns, damping=DAMPING)
            found = written[f"{prefix}{family.output_proj(sublayer)}.weight"]
            # The damped Hessian's largest eigenvalue is below its trace, its smallest above the damping: its condition
            # is at most channels / damping, by which the roundings of the Hessian and of the solution are amplified.
            roundings = 2 * projection.in_features / DAMPING
            assert_same(found, expected, f"layer {layer}, {sublayer}: its weight and the least-squares one", roundings)
            projection.weight.zero_()
            projection.weight[:, columns] = found


@torch.no_grad()
def test_generates_with_a_cache(subject: Subject) -> None:
    model = loaded(subject.adaptive, attn_implementation=subject.family.attention_backend)
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    given = {"return_dict_in_generate": True, "output_logits": True, **asked}
    cached, whole = (model.generate(IDS[:, :10], use_cache=used, **given) for used in (True, False))
    assert torch.equal(cached.sequences, whole.sequences), "other tokens with the cache than without"
    assert_same(torch.stack(cached.logits), torch.stack(whole.logits), "logits with and without the cache", 64)


class Stop(BaseException):
    """Ends a run as a signal does."""


def test_resumes_to_the_same_bits(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refit stopped after the first layer, whose stream is computed again from what is stored."""
    write = CheckpointWriter.write

    def stopping(self: CheckpointWriter, part: int, *arguments: object) -> None:
        if part == 2:
            self.flush()
            raise Stop
        write(self, part, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", stopping)
        with pytest.raises(Stop):
            subject.prune("resumed", **REFITTED)
    resumed = subject.prune("resumed", resume=True, **REFITTED)
    assert checkpoint_bytes(resumed) == checkpoint_bytes(subject.refitted)


def test_estimate_is_exact(subject: Subject) -> None:
    reader = CheckpointReader(subject.uniform)
    options = {"uniform": True, "compensation": "none", "device": "cpu"} | subject.stock_units
    said = pyprune.estimate(subject.folder, "flap", RATIO, **options)
    counts = []
    for own in (subject.reader, reader):
        counts.append(0)
        for layer, shape in enumerate(own.shapes):
            for sublayer in shape.sublayers:
                rows, family = own.family.unit_rows(shape, sublayer), own.family
                linears = [name for name in family.input_projs(sublayer) if name in rows]
                linears += [family.output_proj(sublayer)]
                counts[-1] += sum(math.prod(own.layer_tensors(layer)[f"{name}.weight"].shape) for name in linears)
    assert said.parameters["decoder_linears"] == counts
    assert said.bytes == [subject.reader.bytes, reader.bytes]
    assert [(own["kv_groups"], own["intermediate_channels"]) for own in said.layers or ()] == [
        (shape.kv_groups, shape.intermediate_channels) for shape in reader.shapes
    ]


def test_estimate_counts_what_may_go(tmp_path: Path) -> None:
    """Where sizes are not known before, the ratio is of the units that are named."""
    folder = Subject.made(FAMILIES["llama"], tmp_path).folder
    said = pyprune.estimate(folder, "obs", RATIO, units="channels", device="cpu", samples=4, sequence_length=40)
    shapes = CheckpointReader(folder).shapes
    before, after = said.parameters["decoder_linears"]
    channels = sum(3 * shape.hidden_size * shape.intermediate_channels for shape in shapes)
    assert (said.layers, before - after) == (None, round(RATIO * channels))


def test_padded_export_is_the_pruned_model(subject: Subject, tmp_path: Path) -> None:
    pyprune.export(subject.fits_stock, tmp_path / "padded", "padded", verify=False)
    padded = loaded(tmp_path / "padded")
    assert type(padded).__module__.startswith("transformers.")
    assert_same(logits(padded), logits(loaded(subject.fits_stock)), "logits of the padded and of the pruned model")


def refusals(subject: Subject) -> Iterator[str]:
    """Formats that its small model is not written in."""
    if not (subject.family.gguf and subject.family.computes_llama(subject.reader.config)):
        yield "gguf"
    if not subject.family.remote_code:
        yield "remote-code"


def test_exports_that_are_not_declared_are_refused(subject: Subject, tmp_path: Path) -> None:
    for form in refusals(subject):
        with pytest.raises(pyprune.InputError) as refused:
            pyprune.export(subject.adaptive, tmp_path / f"refused.{form}", form, verify=False)
        assert "\n" not in str(refused.value)
    assert (PRUNED_CLASSES[subject.family.name][2].__name__ in MODELS) == subject.family.vllm
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.gguf])
def test_gguf(name: str, tmp_path: Path) -> None:
    """Written where it is declared, and compared where llama.cpp is installed."""
    subject = Subject.made(FAMILIES[name], tmp_path, **LIKE_LLAMA.get(name, {}))
    add_tokenizer(subject.uniform)
    result = pyprune.export(subject.uniform, tmp_path / "model.gguf", "gguf", dtype="f32")
    assert result["class"].removesuffix(", f32") in subject.family.gguf


@pytest.mark.slow
def test_fresh_process_without_pyprune(subject_of: Callable[[str], Subject], tmp_path: Path) -> None:
    """All families' uniform models in stock classes, and others with their code beside them."""
    cases: dict[str, tuple[Path, str]] = {}
    for name, family in FAMILIES.items():
        subject = subject_of(name)
        cases[name] = subject.uniform, "transformers"
        if family.remote_code:
            pyprune.export(subject.adaptive, tmp_path / f"{name}-code", "remote-code", verify=False)
            cases[f"{name}-code"] = tmp_path / f"{name}-code", "remote-code"
    code = (
        "import json, runpy, sys; from safetensors.torch import load_file, save_file\n"
        "worker, ids = runpy.run_path(sys.argv[1]), load_file('ids')['ids']\n"
        "cases = json.loads(open('cases').read()).items()\n"
        "save_file({name: worker['logits'](loader, model, ids) for name, (model, loader) in cases}, 'logits')\n"
    )
    save_file({"ids": IDS}, tmp_path / "ids")
    (tmp_path / "cases").write_text(json.dumps({name: (str(model), loader) for name, (model, loader) in cases.items()}))
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    command = [sys.executable, "-P", "-c", code, str(Path(logits_worker.__file__))]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = load_file(tmp_path / "logits")
    for name, (model, loader) in cases.items():
        own = subject_of(name.removesuffix("-code"))
        source = own.adaptive if loader == "remote-code" else model
        assert_same(found[name], logits(loaded(source)), f"{name}: logits in a fresh process and here")
