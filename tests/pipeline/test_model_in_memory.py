"""A transformers model in memory: pruned as a saved copy is, unchanged itself, and nothing written unless asked."""

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import family_checkpoint
from support.proofs import prove_here
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import pyprune
from pyprune import InputError
from pyprune.checkpoint import cache, loaded_model, writer

IDS = torch.randint(97, (6, 24), generator=torch.Generator().manual_seed(5))


@contextmanager
def nothing_written(folder: Path) -> Iterator[None]:
    """Whoever writes tensors fails, and the working and the temporary folder stay empty."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tensors are written")

    here, temporary = folder / "here", folder / "temporary"
    here.mkdir()
    temporary.mkdir()
    with pytest.MonkeyPatch.context() as patch, chdir(here):
        patch.setattr(tempfile, "tempdir", str(temporary))
        patch.setattr(writer, "write_tensors", refuse)
        patch.setattr(cache, "save_file", refuse)
        patch.setattr(PreTrainedModel, "save_pretrained", refuse)
        yield
    assert not [*here.iterdir(), *temporary.iterdir()]


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def same_tensors(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


CASES = {
    "slice": ("llama-gqa-tied", "flap", {}),
    "stock": ("qwen2-biases", "wanda-sp", {"uniform": True}),
    "no-text": ("qwen2-sliding", "magnitude", {}),
    "reconstruct": ("llama-biases", "obs", {"allocation_samples": 4}),
    "sparsify": ("llama-gqa-tied", "wanda", {"pattern": "2:4"}),
    "train-selections": ("llama-mha", "disp", {"steps": 2, "rows": 2}),
    "train-units": ("llama-gqa-tied", "policy", {"steps": 2, "rows": 2}),
}


@pytest.mark.parametrize(
    "case", [case if case == "slice" else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_pruned_as_a_saved_copy(case: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    family, method, options = CASES[case]
    folder = family_checkpoint(family, tiny_checkpoint, tmp_path)
    model, untouched = loaded(folder).train(), loaded(folder)
    ratio = 0.5 if method == "wanda" else 0.3
    text = {"calibration": IDS, "evaluate_on": IDS[:2], "device": "cpu"}
    with nothing_written(tmp_path):
        record = pyprune.prune(model, None, method, ratio, **text, **options)
    assert record.output is None
    assert record.model == f"{folder} (in memory)"
    assert same_tensors(model, untouched)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    saved = pyprune.prune(folder, tmp_path / "out", method, ratio, **text, **options)
    written = loaded(tmp_path / "out")
    assert type(record.pruned_model) is type(written)
    assert same_tensors(record.pruned_model, written)
    assert record.layers == saved.layers
    assert record.evaluation is not None
    assert saved.evaluation is not None
    assert record.evaluation["dense"] == saved.evaluation["dense"]
    assert record.evaluation["pruned"]["perplexity"] == saved.evaluation["pruned"]["perplexity"]
    ids = IDS[:1]
    assert torch.equal(record.pruned_model(ids).logits, written(ids).logits)


@pytest.mark.slow
def test_text_sampled_from_it(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """In another type than it is stored in, and by another attention than pyprune samples with."""
    folder = tiny_checkpoint(dtype="bfloat16", vocab_size=97)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    text = {"calibration": "self", "samples": 3, "sequence_length": 16, "device": "cpu"}
    record = pyprune.prune(model, None, "flap", 0.3, dtype="float32", **text)
    saved = pyprune.prune(folder, tmp_path / "out", "flap", 0.3, dtype="float32", **text)
    assert record.calibration == saved.calibration
    assert record.pruned_model.dtype == torch.bfloat16
    assert same_tensors(record.pruned_model, loaded(tmp_path / "out", torch.bfloat16))


@pytest.mark.slow
def test_an_output_too(tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prove_here(monkeypatch)
    model, text = loaded(tiny_checkpoint(dtype="float32", vocab_size=97)), {"calibration": IDS, "device": "cpu"}
    record = pyprune.prune(model, tmp_path / "own", "flap", 0.3, verify=True, **text)
    model.save_pretrained(tmp_path / "saved")
    pyprune.prune(tmp_path / "saved", tmp_path / "out", "flap", 0.3, **text)
    assert record.verification["verified"]
    assert {file.name for file in (tmp_path / "own").iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}
    for file in [*(tmp_path / "out").glob("*.safetensors"), tmp_path / "out" / "config.json"]:
        assert file.read_bytes() == (tmp_path / "own" / file.name).read_bytes(), file
    assert same_tensors(record.pruned_model, loaded(tmp_path / "own"))
    again = pyprune.prune(model, tmp_path / "own", "flap", 0.3, resume=True, **text)
    assert again.to_json() == record.to_json()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] += 1
    with pytest.raises(InputError, match="finished already, with other settings: model"):
        pyprune.prune(model, tmp_path / "own", "flap", 0.3, resume=True, **text)


def small(**changes: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    model = LlamaForCausalLM(config)
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


NAME = r"LlamaForCausalLM \(in memory\)"
REFUSED = {
    "method": ({"method": "no-such"}, "unknown method|no method"),
    "option": ({"method": "flap", "no_such": 1}, "no_such|no-such"),
    "ratio": ({"ratio": 1.5}, "1.5"),
    "length": ({"sequence_length": 65, "calibration": "self"}, "64"),
    "device": ({"device": "tpu"}, "tpu"),
    "no text": ({"calibration": None}, "looks at activations"),
    "no tokenizer": ({"calibration": ["A text."]}, f"{NAME}: no tokenizer came with it: give `tokenizer=`"),
    "no tokenizer to evaluate": ({"evaluate_on": "t.txt"}, f"{NAME}: no tokenizer came with it"),
    "resume": ({"resume": True}, "resume=True needs an output"),
    "verify": ({"verify": True}, "verify=True needs an output"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_are_checked_before_anything_is_copied(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = REFUSED[case]

    def touched(*_: Any) -> None:
        raise AssertionError("a tensor is copied")

    monkeypatch.setattr(loaded_model.LoadedModel, "copy", touched)
    given = {"method": "flap", "ratio": 0.3, "calibration": IDS, "device": "cpu"} | arguments
    with nothing_written(tmp_path), pytest.raises(InputError, match=message):
        pyprune.prune(small(), None, **given)


def offloaded() -> Any:
    model = small()
    model.model.layers[1].to("meta")
    return model


def without_a_layer() -> Any:
    model = small()
    del model.model.layers[1]
    return model


def damaged() -> Any:
    model = small()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    return model


def another_family() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=64, n_embd=8, n_layer=1, n_head=2))


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "no transformers model": (lambda: torch.nn.Linear(2, 2), "Linear: not a transformers model"),
    "another family": (another_family, r"GPT2LMHeadModel \(in memory\): its configuration: .*gpt2"),
    "quantised": (lambda: small(quantization_config={"bits": 4}), "quantised checkpoint cannot be pruned"),
    "float64": (lambda: small().double(), f"{NAME}: tensor .* is stored as torch.float64"),
    "offloaded": (offloaded, f"{NAME}: tensor model.layers.1.* is not in memory but offloaded"),
    "a layer too few": (without_a_layer, f"{NAME}: its configuration: num_hidden_layers is 2, but tensor"),
    "another size": (lambda: small(intermediate_size=40), "has shape .* but its configuration calls for"),
    "an id outside": (lambda: small(bos_token_id=97), f"{NAME}: its configuration: bos_token_id is 97, outside"),
    "nan": (damaged, f"{NAME}: layer 1: tensor mlp.up_proj.weight has nan"),
}


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_pruned(case: str, tmp_path: Path) -> None:
    make, message = MODELS[case]
    with nothing_written(tmp_path), pytest.raises(InputError, match=message):
        pyprune.prune(make(), None, "flap", 0.3, calibration=IDS, device="cpu")


def test_a_head_that_is_not_the_embeddings(tmp_path: Path) -> None:
    """A tied configuration whose head was replaced: the result keeps the head that the model computes with."""
    model = small(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(97, 32, generator=torch.Generator().manual_seed(1)))
    pruned = pyprune.prune(model, None, "magnitude", 0.3, device="cpu").pruned_model
    assert torch.equal(pruned.lm_head.weight, model.lm_head.weight)
    assert torch.equal(pruned.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_the_result_shares_nothing_with_the_model(tiny_checkpoint: Callable[..., Path]) -> None:
    model = loaded(tiny_checkpoint(dtype="float32", vocab_size=97))
    pruned = pyprune.prune(model, None, "magnitude", 0.3, device="cpu").pruned_model
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not own & {tensor.untyped_storage().data_ptr() for tensor in pruned.state_dict().values()}
    del model
    gc.collect()
    assert pruned(IDS[:1]).logits.isfinite().all()


@pytest.mark.slow
def test_the_tokenizer_of_its_folder(demo_model: Path, tmp_path: Path) -> None:
    """It is found where the model came from, encodes the text, and goes beside an output."""
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    text = {"calibration": ["In the old house the year went by. " * 40], "samples": 2, "sequence_length": 16}
    record = pyprune.prune(model, tmp_path / "out", "flap", 0.3, device="cpu", **text)
    assert "the same" in str(record.tokenizer)
    sample = "The old house, 1 234."
    found, own = (AutoTokenizer.from_pretrained(folder)(sample).input_ids for folder in (tmp_path / "out", demo_model))
    assert found == own
