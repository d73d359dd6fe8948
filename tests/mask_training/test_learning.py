"""Learned masks: gates against their definition, the budget against counted parameters, training that resumes."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import FAMILIES, family_checkpoint
from torch import Tensor

from pyprune.architectures import FFN, SUBLAYERS, LayerShape
from pyprune.architectures.channel_selection import FFN_MIDDLE, SELECTIONS, selected_parameters, width
from pyprune.checkpoint import CheckpointReader
from pyprune.checkpoint.load_model import load_model
from pyprune.errors import InputError
from pyprune.mask_training import importance, training
from pyprune.mask_training.budget import TOLERANCE, kept_share, rounded, select
from pyprune.mask_training.disp_learner import SelectionLearner
from pyprune.mask_training.gates import GATES, gumbel_sigmoid, reinmax
from pyprune.mask_training.hypernetwork import Hypernetwork
from pyprune.mask_training.importance import gradient_importance, moment_importance, prior_logits
from pyprune.mask_training.masked_model import ATTENTION_MIDDLE, MaskedModel
from pyprune.mask_training.policy_learner import UnitLearner, start_logits
from pyprune.mask_training.training import train, window_indices

CPU = torch.device("cpu")
MHA, GQA = LayerShape(32, 8, 4, 1, 48), LayerShape(32, 16, 2, 3, 40)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_reinmax_has_its_gradient(temperature: float) -> None:
    """d out / d logits = 2 π1 (1 - π1) - π0 (1 - π0) / 2, in float64; the samples are Bernoulli(σ(l))."""
    logits = torch.linspace(-6, 6, 41, dtype=torch.float64, requires_grad=True)
    out = reinmax(logits, seeded(), temperature)
    assert set(out.tolist()) == {0.0, 1.0}
    (gradient,) = torch.autograd.grad(out.sum(), logits)
    middle = (out.detach() + (logits / temperature).sigmoid()) / 2
    probability = logits.sigmoid()
    expected = 2 * middle * (1 - middle) - probability * (1 - probability) / 2
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-12, atol=1e-15)


def test_gumbel_gate_has_the_gradient_of_its_soft_sample() -> None:
    logits = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gumbel_sigmoid(logits, seeded()).sum(), logits)
    uniform = torch.rand(33, generator=seeded()).double()
    soft = ((logits + torch.logit(uniform)) / 0.4).sigmoid()
    (expected,) = torch.autograd.grad(soft.sum(), logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)  # the noise is drawn in float32


@pytest.mark.parametrize("gate", GATES)
def test_gates_are_drawn_by_probability_and_seed(gate: str) -> None:
    logits = torch.full((20000,), 0.7)
    first, second, other = (GATES[gate](logits, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    expected = 1 / (1 + math.exp(-0.7))
    assert float(first.mean()) == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / 20000))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", [-80.0, 80.0])
def test_gates_of_saturated_logits_are_finite(gate: str, value: float) -> None:
    logits = torch.full((8,), value, requires_grad=True)
    out = GATES[gate](logits, seeded())
    (gradient,) = torch.autograd.grad(out.sum(), logits)
    assert torch.equal(out.detach(), torch.full((8,), float(value > 0)))
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [MHA, GQA], ids=["mha", "gqa"])
def test_parameters_of_a_selection(shape: LayerShape) -> None:
    """By hand: q and o have all heads, k and v the KV heads; everything selected is the dense layer."""
    counts = {"attention_in": 10, "attention_out": 20, "ffn_in": 7, "ffn_middle": 11, "ffn_out": 5}
    heads, kv = shape.kv_groups * shape.heads_per_group, shape.kv_groups
    q, k = heads * shape.head_dim, kv * shape.head_dim
    assert selected_parameters(shape, counts) == 10 * q + 2 * 10 * k + 20 * q + 2 * 7 * 11 + 11 * 5
    whole = {name: width(shape, name) for name in SELECTIONS}
    assert selected_parameters(shape, whole) == shape.parameters
    assert kept_share([shape, shape], [whole, whole]) == 1


def random_logits(shapes: list[LayerShape], seed: int) -> list[dict[str, Tensor]]:
    generator = seeded(seed)
    return [{name: torch.randn(width(s, name), generator=generator) for name in SELECTIONS} for s in shapes]


@pytest.mark.slow
@given(ratio=st.floats(0.05, 0.9), seed=st.integers(0, 100), multiple=st.sampled_from([1, 4]))
def test_selections_meet_the_ratio(ratio: float, seed: int, multiple: int) -> None:
    """By the highest logits; at least `multiple` channels, and multiples of it or all, everywhere."""
    shapes = [LayerShape(128, 16, 4, 2, 320)] * 4
    logits = random_logits(shapes, seed)
    selections = select(shapes, logits, ratio, multiple)
    counts = [{name: len(own[name]) for name in SELECTIONS} for own in selections]
    assert abs(1 - kept_share(shapes, counts) - ratio) <= TOLERANCE
    for shape, own, scores in zip(shapes, selections, logits, strict=True):
        for name in SELECTIONS:
            kept = own[name]
            assert len(kept) >= multiple
            assert len(kept) % multiple == 0 or len(kept) == width(shape, name)
            assert torch.equal(kept, kept.unique())
            left_out = torch.ones(width(shape, name), dtype=torch.bool)
            left_out[kept] = False
            if left_out.any():
                assert scores[name][kept].min() >= scores[name][left_out].max()


def test_refuses_ratios_that_selections_cannot_reach() -> None:
    shapes = [LayerShape(16, 8, 2, 1, 24)] * 2
    logits = random_logits(shapes, 0)
    with pytest.raises(InputError, match="outside"):
        select(shapes, logits, 1.0)
    with pytest.raises(InputError, match=r"one channel stays in every selection, so at most 0\.\d+ can be removed"):
        select(shapes, logits, 0.995)
    with pytest.raises(InputError, match="take a smaller --round-to"):
        select(shapes, logits, 0.1, multiple=16)


def test_rounding_of_counts() -> None:
    assert [rounded(count, 100, 32) for count in (0, 15, 47, 49, 90, 100)] == [32, 32, 32, 64, 96, 100]
    assert rounded(20, 24, 32) == 24


def test_hypernetwork_begins_at_its_prior() -> None:
    prior = [torch.randn(5, generator=seeded()), torch.randn(9, generator=seeded(1))]
    for own, expected in zip(Hypernetwork([5, 9], 0, prior)(), prior, strict=True):
        assert torch.equal(own, expected)
    open_gates = Hypernetwork([5, 9], 0)
    assert all(float(own.detach().mean()) == pytest.approx(3.0, abs=1.0) for own in open_gates())
    again = Hypernetwork([5, 9], 0)
    assert all(torch.equal(a, b) for a, b in zip(open_gates(), again(), strict=True))


Made = Callable[[str], tuple[CheckpointReader, MaskedModel, Tensor]]


@pytest.fixture
def masked(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Made:
    """A family's tiny model under masks, in float64, and windows of its vocabulary."""

    def make(name: str) -> tuple[CheckpointReader, MaskedModel, Tensor]:
        reader = CheckpointReader(family_checkpoint(name, tiny_checkpoint, tmp_path))
        model = load_model(reader.folder, CPU, torch.float64)
        return reader, MaskedModel(model, reader.family), torch.randint(97, (6, 10), generator=seeded())

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_masks_of_ones_change_nothing_and_units_are_cut_like_weights(name: str, masked: Made) -> None:
    """A masked KV group or FFN channel is one whose output projection columns are zero."""
    reader, model, windows = masked(name)
    shapes = reader.shapes
    dense = model.losses(windows)
    model.masks = [{place: torch.ones(width(s, place)) for place in SELECTIONS} for s in shapes]
    assert torch.equal(model.losses(windows), dense)
    masks = []
    for shape in shapes:
        groups = torch.ones(shape.kv_groups)
        groups[-1] = 0
        channels = (torch.arange(shape.intermediate_channels) % 3 > 0).float()
        masks.append({ATTENTION_MIDDLE: groups.repeat_interleave(shape.group_width), FFN_MIDDLE: channels})
    model.masks = masks
    by_masks = model.losses(windows)
    model.masks = [{} for _ in shapes]
    for block, own in zip(model.blocks, masks, strict=True):
        for module, mask in zip(SUBLAYERS, own.values(), strict=True):
            block.get_parameter(reader.family.output_proj(module) + ".weight").data.mul_(mask)
    torch.testing.assert_close(model.losses(windows), by_masks, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(by_masks, dense, rtol=1e-6)


def test_rows_have_masks_of_their_own(masked: Made) -> None:
    reader, model, windows = masked("llama-gqa-tied")
    several = [(torch.rand(2, 1, s.intermediate_channels, generator=seeded()) > 0.5).double() for s in reader.shapes]
    model.masks = [{FFN_MIDDLE: mask} for mask in several]
    together = model.losses(windows[:1].repeat(2, 1))
    for row in range(2):
        model.masks = [{FFN_MIDDLE: mask[row, 0]} for mask in several]
        torch.testing.assert_close(model.losses(windows[:1])[0], together[row])
    assert together[0] != together[1]


def test_recomputed_activations_give_the_same_gradients(masked: Made) -> None:
    reader, _, windows = masked("qwen3-qk-norm")
    gradients = []
    for checkpointing in (False, True):
        own = MaskedModel(load_model(reader.folder, CPU, torch.float64), reader.family, checkpointing)
        gates = [
            {name: torch.full((width(s, name),), 0.9, requires_grad=True) for name in SELECTIONS} for s in reader.shapes
        ]
        own.masks = gates
        flat = [gate for layer in gates for gate in layer.values()]
        gradients.append(torch.autograd.grad(own.losses(windows).mean(), flat))
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)
        assert plain.abs().max() > 0


def test_gradient_importance_is_the_mean_square_of_differences(masked: Made) -> None:
    """Against central differences of the loss in single gates."""
    reader, model, windows = masked("qwen2-biases")
    found = gradient_importance(model, reader.shapes, windows[:3], lambda done, total: None)
    step = 1e-2  # the norms compute in float32 whatever the model's type
    gates = ((0, "attention_in", 3), (1, "attention_out", 5), (0, "ffn_in", 2), (2, "ffn_middle", 7), (1, "ffn_out", 0))
    for layer, name, channel in gates:
        losses = []
        for sign in (1, -1):
            gate = torch.ones(width(reader.shapes[layer], name), dtype=torch.float64)
            gate[channel] += sign * step
            model.masks = [{name: gate} if number == layer else {} for number in range(reader.layers)]
            with torch.no_grad():
                losses.append(model.losses(windows[:3]))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float(found[layer][name][channel]) == pytest.approx(float(slope.square().mean()), rel=5e-3)


def test_moment_importance_is_wifvs(masked: Made) -> None:
    reader, model, windows = masked("llama-mha")
    seen: list[Tensor] = []
    with model.observed(lambda layer, place, value: seen.append(value) if (layer, place) == (1, FFN_MIDDLE) else None):
        model.losses(windows)
    expected = torch.cat([value.flatten(0, -2) for value in seen]).square().sum(0)
    expected *= model.blocks[1].get_parameter(reader.family.output_proj(FFN) + ".weight").square().sum(0)
    found = moment_importance(model, reader.shapes, windows, lambda done, total: None)
    torch.testing.assert_close(found[1][FFN_MIDDLE], expected.detach())


@pytest.mark.parametrize("by_selection", [False, True])
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_prior_expects_the_ratio_and_keeps_the_order(by_selection: bool, ratio: float) -> None:
    shapes = [GQA, GQA]
    worth = [{name: own.double().exp() for name, own in layer.items()} for layer in random_logits(shapes, 3)]
    logits = prior_logits(shapes, worth, ratio, by_selection)
    expected = kept_share(
        shapes, [{name: float(own.sigmoid().sum()) for name, own in layer.items()} for layer in logits]
    )
    assert expected == pytest.approx(1 - ratio, abs=1e-5)
    for layer, own in zip(worth, logits, strict=True):
        for name in SELECTIONS:
            assert torch.equal(layer[name].argsort(), own[name].argsort())
    pool = torch.cat([own[name] for own in logits for name in SELECTIONS])
    if not by_selection:
        assert float(pool.std()) == pytest.approx(importance.SPREAD, rel=1e-4)


def selection_learner(masked: MaskedModel, reader: CheckpointReader, windows: Tensor, gate: str) -> SelectionLearner:
    return SelectionLearner(masked, reader.shapes, windows, 0.4, None, GATES[gate], 1e-2, 6.0, 0)


@pytest.mark.parametrize("gate", GATES)
def test_selection_learner_comes_to_its_budget(gate: str, masked: Made, tmp_path: Path) -> None:
    reader, model, windows = masked("llama-gqa-tied")
    learner = selection_learner(model, reader, windows, gate)
    history = train(learner, 60, 2, 0, tmp_path / "state.safetensors", lambda *_: None)
    assert history[0][1] > 0.8
    last = [kept for _, kept in history[-10:]]
    assert sum(last) / 10 == pytest.approx(0.6, abs=0.06)
    assert all(not parameter.requires_grad for parameter in model.model.parameters())


class Killed(BaseException):
    """Ends a training as a signal would."""


@pytest.mark.parametrize("kind", ["selections", "units"])
def test_a_killed_training_goes_on_to_the_same_masks(
    kind: str, masked: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    reader, model, windows = masked("llama-mha")

    def learner() -> SelectionLearner | UnitLearner:
        if kind == "selections":
            return selection_learner(model, reader, windows, "reinmax")
        return unit_learner(model, reader, windows)

    def result(own: SelectionLearner | UnitLearner) -> list[dict[str, Tensor]]:
        return own.logits() if isinstance(own, SelectionLearner) else own.scores()

    whole = learner()
    expected = train(whole, 8, 1, 3, tmp_path / "whole.safetensors", lambda *_: None)
    file = tmp_path / "state.safetensors"

    def kill(what: str, done: int, total: int) -> None:
        assert what.startswith("train: loss")
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        train(learner(), 8, 1, 3, file, kill)
    resumed = learner()
    steps: list[int] = []
    history = train(resumed, 8, 1, 3, file, lambda what, done, total: steps.append(done))
    assert steps == [5, 6, 7, 8]  # the fifth step was made but not kept
    assert history == expected
    for own, other in zip(result(resumed), result(whole), strict=True):
        assert all(torch.equal(own[name], other[name]) for name in own)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged training state"):
        train(learner(), 8, 1, 3, file, lambda *_: None)


def test_a_loss_that_is_not_finite_is_named(masked: Made, tmp_path: Path) -> None:
    reader, model, windows = masked("llama-mha")
    model.model.get_output_embeddings().weight.data[3] = math.nan
    with pytest.raises(InputError, match="the loss is nan at step 1"):
        train(
            selection_learner(model, reader, windows, "reinmax"), 2, 1, 0, tmp_path / "s.safetensors", lambda *_: None
        )


def test_epochs_see_every_window_once() -> None:
    first = [int(window_indices(draw, 1, 7, 0)) for draw in range(14)]
    assert sorted(first[:7]) == sorted(first[7:]) == list(range(7))
    assert first[:7] != first[7:]
    assert window_indices(3, 4, 7, 0).tolist() == first[3:7]
    assert first != [int(window_indices(draw, 1, 7, 1)) for draw in range(14)]


def unit_learner(model: MaskedModel, reader: CheckpointReader, windows: Tensor, rate: float = 0.05) -> UnitLearner:
    scores = [{m: torch.randn(s.units(m), generator=seeded(5)).double() for m in SUBLAYERS} for s in reader.shapes]
    return UnitLearner(model, reader.shapes, windows, 0.4, start_logits(scores, comparable=True), rate, 0)


class Additive(MaskedModel):
    """Loses `worth` of every channel that is masked, and something of its own in every window."""

    def __init__(self, worth: list[Tensor]) -> None:
        self.worth, self.masks = worth, [{} for _ in worth]
        self._see = None

    def losses(self, ids: Tensor) -> Tensor:
        total = ids[:, 0].float()
        for own, masks in zip(self.worth, self.masks, strict=True):
            if FFN_MIDDLE in masks:
                total = total + ((1 - masks[FFN_MIDDLE].float()) * own).sum(-1).flatten()
        return total


def test_policy_finds_what_is_worth_most(tmp_path: Path) -> None:
    """From equal scores to the channels that matter, at the budget all the way; windows differ more than channels."""
    shapes = [LayerShape(32, 8, 2, 1, 40)] * 2
    worth = [torch.linspace(0, 0.2, 40), torch.linspace(0.4, 0, 40)]
    windows = torch.arange(8)[:, None].repeat(1, 4) * 5
    start = [{m: torch.zeros(s.units(m), dtype=torch.float64) for m in SUBLAYERS} for s in shapes]
    learner = UnitLearner(Additive(worth), shapes, windows, 0.4, start, 0.05, 0)

    def kept_worth() -> float:
        return sum(float((own[FFN].sigmoid() * w).sum()) for own, w in zip(learner.scores(), worth, strict=True))

    before = kept_worth()
    history = train(learner, 400, 2, 0, tmp_path / "state.safetensors", lambda *_: None)
    assert all(kept == pytest.approx(0.6, abs=1e-5) for _, kept in history)
    whole = float(sum(w.sum() for w in worth))
    assert before == pytest.approx(0.6 * whole, rel=1e-3)
    assert kept_worth() > 0.8 * whole


def test_start_logits_keep_the_order() -> None:
    scores = [{m: torch.randn(GQA.units(m), generator=seeded(k)).double() * 10**k for m in SUBLAYERS} for k in range(2)]
    within = start_logits(scores, comparable=False)
    over = start_logits(scores, comparable=True)
    for own, one, other in zip(scores, within, over, strict=True):
        for module in SUBLAYERS:
            assert torch.equal(own[module].argsort(), one[module].argsort())
            assert torch.equal(own[module].argsort(), other[module].argsort())
    assert float(within[0][FFN].std()) == pytest.approx(float(within[1][FFN].std()))
    assert float(over[0][FFN].std()) < float(over[1][FFN].std())
