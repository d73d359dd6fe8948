"""Pruned models in the Auto classes of transformers that are not for causal language models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import family_checkpoint
from support.selected_models import dense_and_selections, dense_model, ids, selected_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from pyprune.checkpoint import CheckpointReader
from pyprune.errors import InputError
from pyprune.modeling import PRUNED_CLASSES
from pyprune.modeling.config import registered_config

AUTO = (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering)


def body_states(model: Any) -> torch.Tensor:
    return model(ids(1), output_hidden_states=True).hidden_states[-1]


@pytest.fixture(params=["mistral-head-dim", "qwen2-sliding", "qwen3-qk-norm"])
def pruned(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A model whose layers differ."""
    reader = CheckpointReader(family_checkpoint(request.param, tiny_checkpoint, tmp_path))
    shapes = [shape.kept(1 + layer % 2, 40 + layer) for layer, shape in enumerate(reader.shapes)]
    config = registered_config(reader.family, reader.config, shapes, o_proj_bias=True, down_proj_bias=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("auto", AUTO)
def test_a_head_goes_on_the_body_of_a_pruned_model(auto: Any, pruned: Path, tmp_path: Path) -> None:
    language_model = AutoModelForCausalLM.from_pretrained(pruned)
    assert language_model.config.model_type.startswith("pyprune_")
    with torch.no_grad():
        expected = body_states(language_model)
        model = auto.from_pretrained(pruned)
        assert torch.equal(body_states(model), expected)
        model.save_pretrained(tmp_path / "saved")
        again = auto.from_pretrained(tmp_path / "saved")
        first, second = model(ids(1)), again(ids(1))
    assert type(again) is type(model)
    assert all(torch.equal(first[name], second[name]) for name in first if isinstance(first[name], torch.Tensor))


def test_a_head_goes_on_a_model_with_selections(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    language_model = selected_model(*dense_and_selections(tiny_checkpoint, tmp_path))
    language_model.save_pretrained(tmp_path / "selected")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "selected", num_labels=3)
    with torch.no_grad():
        assert torch.equal(body_states(model), body_states(language_model))


@pytest.mark.parametrize("auto", AUTO)
def test_a_family_without_such_a_class_is_refused_in_a_sentence(
    auto: Any, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """transformers has no classifier of Granite."""
    _, dense = dense_model("granite-biases", tiny_checkpoint, tmp_path)
    config_class, _, causal_lm_class = PRUNED_CLASSES["granite"]
    config = config_class(**{name: v for name, v in dense.config.to_dict().items() if name != "model_type"})
    causal_lm_class(config).save_pretrained(tmp_path / "saved")
    for load in (lambda: auto.from_pretrained(tmp_path / "saved"), lambda: auto.from_config(config)):
        with pytest.raises(InputError, match=r"pyprune_granite.*AutoModelForCausalLM") as error:
            load()
        assert len(str(error.value).splitlines()) == 1
