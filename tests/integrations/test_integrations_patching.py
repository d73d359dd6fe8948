"""Accelerated tools: small packages with the tools' patch points, and the tools themselves if installed.

PYPRUNE_LLM_COMPRESSOR and PYPRUNE_GPTQMODEL may name such a Python (default: this one); without one the slow tests are
skipped.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from support import integration_checks
from support.paths import ROOT

from pyprune.errors import InputError
from pyprune.integrations import SUPPORTED, accelerate, gptqmodel, llm_compressor, patching
from pyprune.integrations.cholesky_shim import FactorisingTorch, checked_factor
from pyprune.integrations.patching import Calls, with_names

TOOLS = sorted(SUPPORTED)

# What llm-compressor's modules have where the patch points are, from the formulas: H of GPTQ is 2·Σ x xᵀ, of SparseGPT
# the mean 2/N·Σ x xᵀ over batch items, and both walk the columns of the upper factor of (H + damping)^-1.
LLM_COMPRESSOR = {
    "modifiers/gptq/helpers.py": """
import torch


def make_empty_hessian(module, device=None):
    return torch.zeros(module.in_features, module.in_features, device=device)


def accumulate_hessian(inp, module, hessian, num_samples):
    rows = inp.flatten(0, -2).float()
    hessian += 2 * rows.T @ rows
    num_samples += len(inp) if inp.dim() > 2 else 1
    return hessian, num_samples


def prepare_batch(batch, batch_qparams, hessians_by_module, num_samples_by_module):
    return None, torch.stack([hessians_by_module.pop(m) / num_samples_by_module.pop(m) for m in batch])


def factorize_hessian(weights, hessians, percdamp, used_rtn_fallback):
    size = hessians.shape[-1]
    for index, h in enumerate(hessians):
        dead = h.diagonal() == 0
        h[dead, dead] = 1
        weights[index][:, dead] = 0
        h += percdamp * h.diagonal().mean() * torch.eye(size)
        try:
            h[:] = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        except torch.linalg.LinAlgError:
            h[:] = torch.eye(size)
            used_rtn_fallback[index] = True
    return hessians
""",
    "modifiers/gptq/base.py": "from .helpers import accumulate_hessian, make_empty_hessian, prepare_batch\n",
    "modifiers/gptq/gptq_quantize.py": "from .helpers import factorize_hessian\n",
    "modifiers/pruning/sparsegpt/sgpt_sparsify.py": """
import torch


def make_empty_hessian(module, device=None):
    return torch.zeros(module.in_features, module.in_features, device=device)


def accumulate_hessian(inp, module, H, num_samples):
    rows = inp.flatten(0, -2).float()
    total = num_samples + (len(inp) if inp.dim() > 2 else 1)
    H *= num_samples / total
    H += 2 / total * rows.T @ rows
    return H, total


def sparsify_weight(
    module, hessians_dict, sparsity, prune_n, prune_m, block_size, dampening_frac, preserve_sparsity_mask
):
    W, H = module.weight.detach().clone(), hessians_dict.pop(module)
    H += dampening_frac * H.diagonal().mean() * torch.eye(len(H))
    try:
        H = torch.linalg.cholesky(H)
        H = torch.cholesky_inverse(H)
        H = torch.linalg.cholesky(H, upper=True)
    except torch._C._LinAlgError:
        H = torch.eye(len(H))
    loss = 0.0
    for first in range(0, len(H), prune_m):
        columns = slice(first, first + prune_m)
        scores = W[:, columns] ** 2 / H.diagonal()[columns] ** 2
        mask = torch.zeros_like(scores).scatter_(1, scores.topk(prune_n, largest=False)[1], 1.0)
        for column in range(first, first + prune_m):
            error = W[:, column] * mask[:, column - first] / H[column, column]
            loss += error.square().sum().item() / 2
            W[:, column:] -= error[:, None] * H[column, column:]
            W[:, columns][:, : column - first + 1] *= 1 - mask[:, : column - first + 1]
    return loss, W
""",
    "modifiers/pruning/sparsegpt/base.py": """
import contextlib

from .sgpt_sparsify import accumulate_hessian, make_empty_hessian, sparsify_weight


class SparseGPTModifier:
    @contextlib.contextmanager
    def _maybe_onload_hessian(self, module):
        yield
""",
}

# The same for GPTQModel: partial sums of a device, merged and scaled by 2 / tokens; damping goes up in steps.
GPTQMODEL = {
    "quantization/gptq.py": """
import threading

import torch


class QuantizeConfig:
    def __init__(self, group_size, offload_to_disk):
        self.damp_percent, self.damp_auto_increment = 0.05, 0.01


class GPTQ:
    def __init__(self, module, qcfg):
        self.module, self.qcfg, self.lock, self.H, self._tp_pad_cols = module, qcfg, threading.RLock(), None, 0
        self.columns = module.weight[0].numel()
        self.nsamples = self.fwd_counter = 0
        self._device_hessian_partials, self._device_sample_counts, self._hessian_dirty = {}, {}, False

    def add_batch(self, inp, out, batch_index=None):
        count, xtx, device = self.process_batch(inp)
        if count == 0:
            return
        self.fwd_counter += 1
        partial = self._device_hessian_partials.get(device)
        self._device_hessian_partials[device] = xtx if partial is None else partial.add_(xtx)
        self._device_sample_counts[device] = self._device_sample_counts.get(device, 0) + count
        self.nsamples += count
        self._hessian_dirty = True

    def process_batch(self, inp):
        if isinstance(self.module, torch.nn.Conv2d):
            inp = torch.nn.functional.unfold(inp, self.module.kernel_size).mT
        rows = inp.reshape(-1, self.columns).float()
        return len(rows), rows.T @ rows, inp.device

    def _wait_partial_ready(self, device):
        pass

    def _record_partial_ready(self, device):
        pass

    def _record_hessian_ready(self, device):
        pass

    def materialize_global_hessian(self, target_device=None):
        if self._hessian_dirty:
            self.nsamples = sum(self._device_sample_counts.values())
            self.H = sum(self._device_hessian_partials.values()) * (2 / self.nsamples)
            self._device_hessian_partials.clear()
            self._device_sample_counts.clear()
            self._hessian_dirty = False

    def hessian_inverse(self, H):
        floor = 0.0
        while True:
            H.diagonal().add_(floor)
            damping = self.qcfg.damp_percent
            while damping < 1:
                damped = H + damping * H.diagonal().mean() * torch.eye(len(H))
                factor, failed = torch.linalg.cholesky_ex(damped, check_errors=False)
                if not failed:
                    torch.cholesky_inverse(factor, out=factor)
                    return torch.linalg.cholesky(factor, upper=True), damping
                damping += self.qcfg.damp_auto_increment
            floor = 1e-6
""",
}


def write_package(folder: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        for parent in path.relative_to(folder.parent).parents:
            (folder.parent / parent / "__init__.py").touch()


def know_functions(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the functions that the tool has now for tested ones."""
    known = {name: frozenset({mark}) for name, mark in integration_checks.fingerprints(tool).items()}
    monkeypatch.setitem(patching.KNOWN_SOURCES, tool, known)


def forget(packages: tuple[str, ...]) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]


@pytest.fixture
def small_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Packages `llmcompressor` and `gptqmodel` that have the patch points, of a release with known functions."""
    packages = tmp_path / "packages"
    names = {releases.distribution: "99.0" for releases in SUPPORTED.values()}
    write_package(packages / "llmcompressor", LLM_COMPRESSOR)
    write_package(packages / "gptqmodel", GPTQMODEL)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setattr(metadata, "version", names.__getitem__)
    mine = {name for name in sys.modules if name.split(".")[0] in names}
    for name in mine:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    for tool in TOOLS:
        know_functions(tool, monkeypatch)
    yield packages
    forget(tuple(names))


@pytest.mark.parametrize("tool", TOOLS)
def test_small_tools(small_tools: Path, tool: str) -> None:
    """Hessians, factors, fallbacks and what a block leaves behind: integration_checks.py."""
    integration_checks.run_checks(tool)


@pytest.mark.parametrize("tool", TOOLS)
def test_one_block_at_a_time(small_tools: Path, tool: str) -> None:
    points = {
        "llm-compressor": integration_checks.llm_compressor_seams,
        "gptqmodel": integration_checks.gptqmodel_seams,
    }
    originals = points[tool]()
    block = accelerate(tool)
    with block:
        inside = points[tool]()
        assert inside != originals
        for second in (block, accelerate(tool)):
            with pytest.raises(InputError, match=f"^{tool} is accelerated already; leave the first block.*$"):
                second.__enter__()
        assert points[tool]() == inside
    assert points[tool]() == originals
    with block as calls:  # another time, after it was left
        assert calls == Calls()
    assert points[tool]() == originals
    with pytest.raises(RuntimeError, match="never entered"):
        block.__exit__(None, None, None)


def test_tools_do_not_exclude_each_other(small_tools: Path) -> None:
    with accelerate("llm-compressor"), accelerate("gptqmodel"):
        pass


SPARSIFY = "module, hessians_dict, sparsity, prune_n, prune_m, block_size, dampening_frac, preserve_sparsity_mask"

# Something that another patch or a later release could do: (tool, file, added source, what is said).
CHANGES: dict[str, tuple[str, str, str, str]] = {
    "parameters": ("llm-compressor", "modifiers/gptq/base.py", "def accumulate_hessian(inp, module, hessian): pass",
                   r"gptq\.base\.accumulate_hessian of 99\.0 is not the one of the tested releases 0\.14\.0, "),
    "body": ("llm-compressor", "modifiers/gptq/helpers.py",
             "def prepare_batch(batch, batch_qparams, hessians_by_module, num_samples_by_module): return None, None\n",
             r"gptq\.base\.prepare_batch of 99\.0 is not the one of"),
    "wrapped by its name": ("llm-compressor", "modifiers/gptq/base.py",
                            "import functools\n_inner = accumulate_hessian\n@functools.wraps(_inner)\n"
                            "def accumulate_hessian(*args): return _inner(*args)\n",
                            r"gptq\.base\.accumulate_hessian of 99\.0 is not the one of"),
    "without a source": ("gptqmodel", "quantization/gptq.py",
                         "exec('def add_batch(self, inp, out, batch_index=None): pass')\nGPTQ.add_batch = add_batch\n",
                         r"GPTQ\.add_batch of 99\.0 is not the one of"),
    "gone": ("llm-compressor", "modifiers/gptq/gptq_quantize.py", "del factorize_hessian",
             r"gptq_quantize\.factorize_hessian is no function"),
    "wrapped": ("llm-compressor", "modifiers/pruning/sparsegpt/base.py",
                "import functools; sparsify_weight = functools.partial(sparsify_weight)",
                r"sparsegpt\.base\.sparsify_weight is no function"),
    "another scale": ("llm-compressor", "modifiers/gptq/helpers.py",
                      "def accumulate_hessian(inp, module, hessian, num_samples):\n"
                      "    rows = inp.flatten(0, -2).float()\n"
                      "    return hessian.add_(rows.T @ rows), num_samples + 1\n",
                      "accumulate_hessian does not compute what pyprune would put in its place"),
    "another damping": ("llm-compressor", "modifiers/gptq/helpers.py",
                        "_own = factorize_hessian\n"
                        "def factorize_hessian(weights, hessians, percdamp, used_rtn_fallback):\n"
                        "    return _own(weights, hessians, 2 * percdamp, used_rtn_fallback)\n",
                        "factorize_hessian does not compute what"),
    "another chain": ("llm-compressor", "modifiers/pruning/sparsegpt/sgpt_sparsify.py",
                      "_own = sparsify_weight\n"
                      f"def sparsify_weight({SPARSIFY}):\n"
                      f"    return _own({SPARSIFY})\n",
                      "sparsify_weight factorises 0 Hessians for one layer"),
    "tokens": ("gptqmodel", "quantization/gptq.py",
               "def _process_batch(self, inp):\n"
               "    rows = inp.reshape(-1, self.columns).float()\n"
               "    return 1, rows.T @ rows, inp.device\n"
               "GPTQ.process_batch = _process_batch\n",
               r"GPTQ\.add_batch does not compute what"),
    "method": ("gptqmodel", "quantization/gptq.py", "GPTQ.hessian_inverse = lambda self, H, damping: None",
               r"GPTQ\.hessian_inverse of 99\.0 is not the one of the tested releases 7\.7\.0"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changed_tools_are_refused(small_tools: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, and before anything is replaced; the next block is not locked out."""
    tool, file, source, message = CHANGES[change]
    forget(("llmcompressor", "gptqmodel"))
    path = small_tools / SUPPORTED[tool].distribution / file
    path.write_text(path.read_text() + source)
    if "does not compute" in message or "factorises" in message:  # what a small example shows, if the sources do not
        know_functions(tool, monkeypatch)
    points: dict[str, Callable[[], dict[str, Any]]] = {
        "llm-compressor": integration_checks.llm_compressor_seams,
        "gptqmodel": integration_checks.gptqmodel_seams,
    }
    before = None if change == "gone" else points[tool]()
    for _ in range(2):
        with pytest.raises(InputError, match=message) as refused:
            accelerate(tool).__enter__()
        assert "\n" not in str(refused.value)
        assert "nothing was replaced" in str(refused.value)
    assert change == "gone" or points[tool]() == before


@pytest.mark.parametrize("tool", TOOLS)
def test_missing_tools(monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(InputError, match=f"^{tool} is not installed here; pip install .*==.*$"):
        accelerate(tool).__enter__()


def test_unknown_tool() -> None:
    with pytest.raises(InputError, match="no integration for 'autoawq'; there are llm-compressor, gptqmodel"):
        accelerate("autoawq")


@pytest.mark.slow
def test_nothing_is_imported_with_the_integrations() -> None:
    """Only a block imports its tool. (pyprune itself imports transformers.)"""
    program = (
        "import sys, pyprune; before = set(sys.modules); import pyprune.integrations; "
        "print([n for n in set(sys.modules) - before if n.split('.')[0] in "
        "('llmcompressor', 'gptqmodel', 'transformers', 'compressed_tensors')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
    assert llm_compressor.TOOL in SUPPORTED
    assert gptqmodel.TOOL in SUPPORTED


def test_chain_fails_as_the_tools_chain_does() -> None:
    """Not positive definite, NaN, singular, and an inverse that overflows: an error, or info; never a wrong factor."""
    torch.manual_seed(0)
    x = torch.randn(20, 6)
    sound = x.T @ x
    own = FactorisingTorch(Calls())
    for bad in (-sound, torch.full((6, 6), torch.nan), sound - sound, torch.eye(6) * 1e-39, sound * torch.inf):
        assert own.linalg.cholesky_ex(bad, check_errors=False)[1].item() != 0
        with pytest.raises(torch._C._LinAlgError):
            own.linalg.cholesky(bad)
        with pytest.raises(torch._C._LinAlgError):
            torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(bad)), upper=True)
    factor, failed = checked_factor(sound)
    assert not failed
    pending = own.linalg.cholesky(sound)
    assert torch.equal(own.linalg.cholesky(own.cholesky_inverse(pending, out=pending), upper=True), factor)
    # Any other use of what the first step returns fails, instead of going on with something else.
    for use in (lambda: pending + 1, lambda: torch.linalg.inv(pending), lambda: own.linalg.cholesky(pending)):
        with pytest.raises(TypeError):
            use()
    # And the rest of torch is torch.
    lower = torch.linalg.cholesky(sound)
    assert torch.equal(own.cholesky_inverse(lower), torch.cholesky_inverse(lower))
    assert torch.equal(own.linalg.cholesky(sound, upper=True), torch.linalg.cholesky(sound, upper=True))
    assert own.Tensor is torch.Tensor
    assert own.linalg.inv is torch.linalg.inv


def test_functions_with_other_names() -> None:
    """Functions made inside see the names as well; the original and its module do not change."""
    globals_before = dict(globals())

    def original(a: int, *, b: int = 2) -> Any:
        def inner() -> Any:
            return torch

        return inner(), a, b

    changed = with_names(original, torch="ours")  # type: ignore[arg-type]
    assert changed(1) == ("ours", 1, 2)
    assert original(1) == (torch, 1, 2)
    assert changed.__name__ == "original"
    assert globals() == globals_before


def python_with(distribution: str, variable: str) -> str:
    python = os.environ.get(variable, sys.executable)
    find = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({distribution!r}) is None)"
    if subprocess.run([python, "-I", "-c", find], check=False).returncode:
        if python != sys.executable:
            pytest.fail(f"{variable}={python} has no {distribution}")
        pytest.skip(f"{distribution} is not installed; {variable} may name a Python that has it")
    return python


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "variable"), [("llm-compressor", "PYPRUNE_LLM_COMPRESSOR"), ("gptqmodel", "PYPRUNE_GPTQMODEL")]
)
def test_tools(tool: str, variable: str, tmp_path: Path) -> None:
    python = python_with(SUPPORTED[tool].distribution, variable)
    finished = subprocess.run(
        [python, Path(integration_checks.__file__), tool],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    assert len(json.loads(finished.stdout.splitlines()[-1])) == len(integration_checks.CHECKS[tool])
