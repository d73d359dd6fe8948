"""What a pruning works on: every argument and input checked, before anything is written."""

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor

from . import calibration
from .allocation import check_ratio
from .checkpoint import CheckpointReader, check_place, checkpoint_folder, digest
from .device import select_device, select_dtype
from .errors import InputError
from .forward import LayerForward
from .methods import Method, make_method
from .ops import backends
from .options import Progress, PruneOptions
from .plan import FORMAT
from .windows import SELF, calibration_windows, evaluation_windows, load_windows, save_windows

# Operators that read activations, in the compute type; the others work on float32 statistics.
ACTIVATION_OPERATORS = ("channel_moments", "hessian")


class Job:
    """The method, the model, the windows, and what the result depends on. Raises InputError for what is wrong.

    `identity` names everything that the output's bits follow from; `biases` says which drivers of the output
    have a bias (a stock family's own ones apart).
    """

    def __init__(self, options: PruneOptions, progress: Progress) -> None:
        self.start = perf_counter()
        self.options, self.progress = options, progress
        self.method: Method = make_method(options.method, options.method_options)
        self.device = select_device(options.device)
        self.reader = CheckpointReader(checkpoint_folder(options.model))
        self.dtype = select_dtype(options.dtype, self.reader.dtype, self.device)
        check_ratio(self.reader.shapes, options.ratio)
        self.method.check(self.reader.shapes, options.ratio)
        self.cache = (options.cache or options.output.absolute().parent / ".pyprune-cache").absolute()
        check_place(self.cache / "survey")
        self.biases = {
            name: self.method.biased or bool(getattr(self.reader.config, name, False))
            for name in ("o_proj_bias", "down_proj_bias")
        }
        self.model_fingerprint = self.reader.fingerprint()
        self.backends = self._backends() if self.method.needs_text else {}
        self.windows = self._windows() if self.method.needs_text else None
        # Before the first layer: a text that cannot be read must not cost the whole run.
        self.evaluation_windows = self._evaluation_windows()
        self.text_fingerprint = None if self.windows is None else calibration.fingerprint(self.windows)
        self.identity: dict[str, Any] = {
            "format": FORMAT,
            "model": self.model_fingerprint,
            "method": self.method.name,
            "options": self.method.options,
            "ratio": options.ratio,
            "calibration": self.text_fingerprint,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "backends": self.backends,
            "allow_nonfinite": options.allow_nonfinite,
            "torch": torch.__version__,
        }

    def forward(self) -> LayerForward:
        assert self.windows is not None
        return LayerForward(self.reader, self.windows, self.device, self.dtype, self.options.allow_nonfinite)

    def cache_file(self, kind: str, operators: tuple[str, ...], **what: Any) -> tuple[Path, dict[str, Any]]:
        """Where statistics of this model and text are kept, and what their numbers follow from.

        `operators`: those that they were computed by; `what`: everything else that they depend on.
        """
        names = ("model", "calibration", "dtype", "device", "allow_nonfinite", "torch")
        identity = {name: self.identity[name] for name in names}
        identity |= {"backends": {name: self.backends[name] for name in operators}} | what
        return self.cache / f"{kind}-{digest(identity)}.safetensors", identity

    def _backends(self) -> dict[str, str]:
        """The backend of every operator that the method uses: results follow from it to the last bit."""
        chosen = {}
        for operator in self.method.operators:
            # Which kernel runs may depend on sizes: those of the whole job are named by its shapes and this choice.
            dtype = self.dtype if operator in ACTIVATION_OPERATORS else torch.float32
            sample = torch.empty(1, 8, dtype=dtype, device=self.device)
            shape = None if operator in ACTIVATION_OPERATORS else (1, 1)
            chosen[operator] = backends.choose_backend(operator, sample, shape)
        return chosen

    def _windows(self) -> Tensor:
        o, config = self.options, self.reader.config
        if o.calibration is None:
            raise InputError(
                f"method {self.method.name} looks at activations: give --calibration FILE (.txt or .jsonl), "
                f"or --calibration {SELF} for text sampled from the model itself"
            )
        return self._sampled_once(
            o.calibration,
            o.samples,
            o.sequence_length,
            o.seed,
            lambda: calibration_windows(
                o.calibration or SELF,
                self.reader.folder,
                config,
                o.samples,
                o.sequence_length,
                o.seed,
                self.device,
                self.dtype,
                o.trust_remote_code,
                lambda done, total: self.progress("sampling text", done, total),
            ),
        )

    def _evaluation_windows(self) -> Tensor | None:
        evaluation = self.options.evaluation
        if evaluation is None:
            return None
        seed = self.options.seed + 1  # sampled text must not be the text of the calibration
        return self._sampled_once(
            evaluation.text,
            evaluation.max_windows,
            evaluation.sequence_length,
            seed,
            lambda: evaluation_windows(
                evaluation.text,
                self.reader.folder,
                self.reader.config,
                evaluation.sequence_length,
                evaluation.max_windows,
                seed,
                self.device,
                self.dtype,
                self.options.trust_remote_code,
                lambda done, total: self.progress("sampling text", done, total),
            ),
        )

    def _sampled_once(self, source: str, samples: int | None, length: int, seed: int, make: Any) -> Tensor:
        """Windows by `make`; those sampled from the model are kept, so that another ratio need not load it whole."""
        if source != SELF:
            return make()
        key = {
            "model": self.model_fingerprint,
            "windows": [samples, length, seed],
            "dtype": str(self.dtype),
            "device": self.device.type,
            "versions": [torch.__version__, transformers.__version__],
        }
        path = self.cache / f"text-{digest(key)}.safetensors"
        if path.is_file():
            return load_windows(path)
        windows = make()
        save_windows(path, windows)
        return windows
