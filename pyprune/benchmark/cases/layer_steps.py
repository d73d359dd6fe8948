"""A decoder layer's elementwise steps in one pass each: RMSNorm, rotary embedding and SwiGLU, bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ...ops import rms_norm, rotate_, swiglu_
from ...ops.rms_norm import rms_norm_reference
from ...ops.rotary import rotate_reference
from ...ops.swiglu import swiglu_reference
from ..case import OTHER, Candidate, Case, Errors, Problem, Scale, normal, relative_distance
from ..models import Model
from ..rates import Work

EPS = 1e-5
STEPS = "transformers' steps"


def against(exact: Tensor, result: Tensor) -> Errors:
    return {"result": relative_distance(result, exact)}


def as_the_steps(plain: Errors) -> Errors:
    """The steps round where ours do, so that errors are alike; a hundredth for sums in another order."""
    return {"result": 1.01 * plain["result"]}


def normed_problem(tokens: int, channels: int, device: torch.device) -> Problem:
    x = normal(device, torch.bfloat16, tokens, channels)
    weight = normal(device, torch.bfloat16, channels, seed=1)
    exact = rms_norm_reference(x.double(), weight.double(), EPS)
    return Problem(
        Candidate("own", lambda: rms_norm(x, weight, EPS)),
        (
            Candidate(
                STEPS,
                lambda: rms_norm_reference(x, weight, EPS),
                kind=OTHER,
                source="transformers, LlamaRMSNorm",
                compilable=True,
            ),
            Candidate("functional.rms_norm", lambda: functional.rms_norm(x, (channels,), weight, EPS)),
        ),
        partial(against, exact),
        STEPS,
        as_the_steps,
    )


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' apply_rotary_pos_emb of one tensor."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat([-second, first], dim=-1) * sin.unsqueeze(1)


def rotated_by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    (c1, c2), (s1, s2) = (angles.unsqueeze(1).chunk(2, dim=-1) for angles in (cos, sin))
    return torch.cat([first * c1 - second * s1, second * c2 + first * s2], dim=-1)


def rotary_problem(heads: int, tokens: int, head_dim: int, device: torch.device) -> Problem:
    q = normal(device, torch.bfloat16, 1, tokens, heads, head_dim).transpose(1, 2)  # as a projection leaves it
    angles = normal(device, torch.float32, 1, tokens, head_dim, seed=1)
    cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
    turned, exact = q.clone(), q.double()
    rotate_reference(exact, cos.double(), sin.double())

    def own() -> Tensor:
        rotate_(turned, cos, sin)
        return turned

    return Problem(
        Candidate("own", own, lambda: turned.copy_(q)),
        (
            Candidate(
                STEPS,
                lambda: rotated(q, cos, sin),
                kind=OTHER,
                source="transformers, apply_rotary_pos_emb",
                compilable=True,
            ),
            Candidate("half by half", lambda: rotated_by_halves(q, cos, sin), compilable=True),
        ),
        partial(against, exact),
        STEPS,
        as_the_steps,
    )


def swiglu_problem(tokens: int, channels: int, device: torch.device) -> Problem:
    stored, up = (normal(device, torch.bfloat16, tokens, channels, seed=seed) for seed in (0, 1))
    gate, exact = stored.clone(), stored.double()
    swiglu_reference(exact, up.double())

    def start() -> Tensor:
        return gate.copy_(stored)

    def own() -> Tensor:
        swiglu_(gate, up)
        return gate

    return Problem(
        Candidate("own", own, start),
        (
            Candidate(
                STEPS,
                lambda: functional.silu(stored) * up,
                kind=OTHER,
                source="transformers, LlamaMLP",
                compilable=True,
            ),
            Candidate("silu and mul_, in place", lambda: functional.silu(gate, inplace=True).mul_(up), start),
        ),
        partial(against, exact),
        STEPS,
        as_the_steps,
    )


def norm_cases(model: Model, scale: Scale) -> Iterator[Case]:
    tokens, channels = scale.activations, model.hidden
    # Squares and their sum, the factor, the weight.
    work = Work(4 * tokens * channels + 2 * channels, 4 * tokens * channels)
    make = partial(normed_problem, tokens, channels)
    size = (tokens, channels)
    yield Case("rms_norm", model.name, f"{tokens}x{channels}", torch.bfloat16, work, make, "rms_norm", size)


def rotary_cases(model: Model, scale: Scale) -> Iterator[Case]:
    size = (1, model.heads, scale.activations, model.head_dim)
    elements = model.heads * scale.activations * model.head_dim
    # Two products and a sum; cos and sin are read once for all heads.
    work = Work(4 * elements + 4 * scale.activations * model.head_dim, 3 * elements)
    make = partial(rotary_problem, *size[1:])
    name = "x".join(map(str, size[1:]))
    yield Case("rotary", f"{model.name}-q", name, torch.bfloat16, work, make, "rotary", size)


def swiglu_cases(model: Model, scale: Scale) -> Iterator[Case]:
    size = (scale.activations, model.intermediate)
    elements = scale.activations * model.intermediate
    # exp, a sum and a quotient for the sigmoid, two products.
    work = Work(6 * elements, 5 * elements)
    make = partial(swiglu_problem, *size)
    yield Case("swiglu", model.name, f"{size[0]}x{size[1]}", torch.bfloat16, work, make, "swiglu", size)
