"""FLAP against the authors' golden vectors, their recurrence written out, and the formulas."""

import pytest
import torch
from torch import Tensor

from pyprune.architectures import ATTENTION, FFN, LayerShape
from pyprune.calibration.channel_statistics import ChannelObserver, ChannelStatistics
from pyprune.errors import InputError
from pyprune.methods import make_method
from pyprune.methods.flap import Flap, reference_threshold, standardise


def golden_statistics() -> ChannelStatistics:
    """C=4, L=3, N=4, O=3: x[k,t,c] = sin(0.7(k+1) + 0.31 t (c+1)), W[o,c] = cos(0.5 o + 0.9 c)."""
    k, t, c = torch.meshgrid(torch.arange(4), torch.arange(3), torch.arange(4), indexing="ij")
    x = torch.sin(0.7 * (k + 1) + 0.31 * t * (c + 1))
    o, j = torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")
    observer = ChannelObserver(torch.cos(0.5 * o + 0.9 * j), "golden", by_window=True, allow_nonfinite=False)
    observer.observe(x[:1])
    observer.observe(x[1:])
    return observer.result()


def close(value: Tensor, golden: list[float]) -> None:
    torch.testing.assert_close(value.double(), torch.tensor(golden, dtype=torch.float64), atol=1e-5, rtol=0)


def test_golden_vectors() -> None:
    s = golden_statistics()
    assert s.mean is not None
    close(s.mean, [0.614047, 0.438813, 0.234197, 0.059659])
    assert s.reference_fluctuation is not None
    close(s.reference_fluctuation, [0.345549, 0.716167, 1.025897, 1.106554])
    close(s.input_squares(), [1.595366, 1.49704, 1.483153, 1.535858])
    reference = {metric: Flap(metric=metric, mode="reference") for metric in ("WIFV", "WIFN")}
    close(reference["WIFV"].channel_scores(s, FFN), [0.712548, 0.372267, 1.419151, 2.803137])
    close(reference["WIFN"].channel_scores(s, FFN), [1.017992, 0.454693, 0.745201, 1.136216])


def naive_recurrence(x: Tensor) -> Tensor:
    """The authors' add_batch with batch 1, in float64: the old mean is an alias that the update overwrites."""
    windows, _, channels = x.shape
    baseline = torch.zeros(channels, dtype=torch.float64)
    fluctuation = torch.zeros(channels, dtype=torch.float64)
    for samples in range(windows):
        inp = x[samples].double()  # [tokens, channels]
        old_baseline = baseline
        baseline *= samples / (samples + 1)
        baseline += inp.mean(0) / (samples + 1)
        if samples == 0:
            fluctuation = torch.zeros(channels, dtype=torch.float64)
        else:
            fluctuation *= (samples - 1) / samples
            fluctuation += ((inp - baseline) * (inp - old_baseline)).sum(0) / (samples + 1)
    return fluctuation


def test_closed_form_is_the_authors_recurrence() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 11, 5, generator=generator) * torch.tensor([1.0, 0.1, 10, 1, 1]) + 2
    observer = ChannelObserver(torch.randn(3, 5), "naive", by_window=True, allow_nonfinite=False)
    observer.observe(x)
    value = observer.result().reference_fluctuation
    assert value is not None
    # The window moments are float32 and merged in float64: a few units in the last place of float32.
    torch.testing.assert_close(value, naive_recurrence(x), rtol=1e-5, atol=0)


def test_exact_scores_follow_the_formulas_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(3, 50, 8, generator=generator), torch.randn(6, 8, generator=generator)
    observer = ChannelObserver(w, "exact", by_window=False, allow_nonfinite=False)
    observer.observe(x)
    s = observer.result()
    tokens, weight = x.double().reshape(-1, 8), w.double()
    variance, squares = tokens.var(0), (tokens**2).sum(0) / 3
    expected = {
        "IFV": variance,
        "WIFV": variance * (weight**2).sum(0),
        "WIFN": (weight.abs() * squares.sqrt()).mean(0),
    }
    for metric, value in expected.items():
        torch.testing.assert_close(Flap(metric=metric).channel_scores(s, FFN), value, rtol=2e-6, atol=0)
    plain, squared = Flap(), Flap(square_attention=True)
    torch.testing.assert_close(
        squared.channel_scores(s, ATTENTION), plain.channel_scores(s, ATTENTION) ** 2, rtol=1e-12, atol=0
    )
    assert torch.equal(squared.channel_scores(s, FFN), plain.channel_scores(s, FFN))
    wanda = make_method("wanda-sp", {}).channel_scores(s, FFN)
    torch.testing.assert_close(wanda, expected["WIFN"], rtol=2e-6, atol=0)
    magnitude = make_method("magnitude", {}).channel_scores(s, FFN)
    torch.testing.assert_close(magnitude, weight.norm(dim=0), rtol=2e-6, atol=0)


def statistics(fluctuation: Tensor) -> ChannelStatistics:
    """Statistics whose WIFV score is `fluctuation`."""
    ones = torch.ones(len(fluctuation))
    return ChannelStatistics(ones, ones, count=2, windows=1, mean=0 * ones, m2=fluctuation.float())


def test_adaptive_unit_scores_are_means_of_z_scores_over_kv_groups() -> None:
    shape = LayerShape(16, 2, 2, 2, 3)  # two groups of two query heads, each head two channels wide
    attention = torch.tensor([1.0, 2, 3, 4, 10, 20, 30, 40])
    ffn = torch.tensor([1.0, 2, 6])
    layer = {ATTENTION: statistics(attention), FFN: statistics(ffn)}
    z = ((attention - attention.mean()) / attention.std()).double()
    scores = Flap().unit_scores(layer, shape)
    torch.testing.assert_close(scores[ATTENTION], torch.stack([z[:4].mean(), z[4:].mean()]), rtol=1e-6, atol=0)
    torch.testing.assert_close(scores[FFN], ((ffn - ffn.mean()) / ffn.std()).double(), rtol=1e-6, atol=1e-12)
    uniform = Flap(structure="UL-UM").unit_scores(layer, shape)
    assert uniform[ATTENTION].tolist() == [10.0, 100.0]
    squared = (attention**2).double()
    z = (squared - squared.mean()) / squared.std()
    reference = Flap(mode="reference")
    for s in layer.values():
        s.reference_fluctuation = s.fluctuation()
    torch.testing.assert_close(
        reference.unit_scores(layer, shape)[ATTENTION], torch.stack([z[:4].mean(), z[4:].mean()])
    )
    assert standardise(torch.ones(3, dtype=torch.float64)).tolist() == [0, 0, 0]


def test_reference_threshold_truncates_the_cost_of_a_head() -> None:
    # One layer of two 128-wide heads (170 each, not 512/3) and 340 channels: 680 in all.
    shape = LayerShape(64, 128, 2, 1, 340)
    scores = {
        ATTENTION: torch.tensor([1000.0, -1000.0], dtype=torch.float64),
        FFN: torch.arange(340, dtype=torch.float64),
    }
    # Half of 680 is 340: the best head (170) and 170 channels, 339 down to 170, the last of which goes too.
    threshold = reference_threshold([scores], [shape], 0.5)
    assert threshold == 170.0
    kept = Flap(mode="reference").choose([scores], [shape], 0.5).layers[0]
    assert kept[ATTENTION].tolist() == [0]
    assert kept[FFN].tolist() == list(range(171, 340))


@pytest.mark.parametrize("structure", ["UL-UM", "UL-MM", "AL-MM", "AL-AM"])
def test_structures_meet_the_ratio(structure: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [LayerShape(64, 8, 8, 2, 200)] * 4
    survey = [
        {
            ATTENTION: statistics(torch.rand(128, generator=generator) * (layer + 1)),
            FFN: statistics(torch.rand(200, generator=generator) ** (layer + 1)),
        }
        for layer in range(4)
    ]
    manual = {"attention_ratio": 0.125} if structure.endswith("MM") else {}
    method = Flap(structure=structure, **manual)
    choice = method.choose(method.scores(survey, shapes), shapes, 0.3)
    kept = sum(s.kept(len(c[ATTENTION]), len(c[FFN])).parameters for s, c in zip(shapes, choice.layers, strict=True))
    assert 1 - kept / sum(s.parameters for s in shapes) == pytest.approx(0.3, abs=0.005)
    groups = [len(c[ATTENTION]) for c in choice.layers]
    if structure.startswith("UL"):
        assert len({(len(c[ATTENTION]), len(c[FFN])) for c in choice.layers}) == 1
    else:
        assert len({len(c[FFN]) for c in choice.layers}) > 1
    if manual:
        assert sum(groups) == 4 * 7  # one of eight groups in each layer, or as many over the whole model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "L2"}, "flap has no metric 'L2'; one of IFV, WIFV, WIFN"),
        ({"structure": "AL"}, "no structure 'AL'"),
        ({"mode": "fast"}, "no mode 'fast'"),
        ({"compensation": "weights"}, "no compensation 'weights'"),
        ({"attention_ratio": 0.1}, "UL-MM and AL-MM only"),
        ({"depth": 3}, "has no option --depth"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_method("flap", options)
    with pytest.raises(InputError, match="unknown method 'flop'; known: magnitude, wanda-sp, flap"):
        make_method("flop", {})
