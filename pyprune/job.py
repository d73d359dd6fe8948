"""What a pruning works on: every argument and input checked, before anything is written."""

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor

from . import calibration, distributed
from .checkpoint import CheckpointReader, LayerLoader, begun_identity, check_place, checkpoint_folder, digest
from .device import select_dtype, whole_memory
from .errors import InputError
from .forward import LayerForward, micro_batch
from .fused import OPERATORS as FORWARD_OPERATORS
from .learning.memory import check_fits, training_memory
from .memory_plan import MemoryPlan, Sizes, plan_memory
from .methods import LearnedMethod, Method, make_method, resolved_ratio
from .ops import backends
from .options import Progress, PruneOptions
from .plan import FORMAT
from .tuning import operator_fingerprint
from .windows import SELF, calibration_windows, evaluation_windows, load_windows, save_windows

# Operators that read activations, in the compute type; the others work on float32 statistics.
ACTIVATION_OPERATORS = ("channel_moments", "hessian", *FORWARD_OPERATORS)


class Job:
    """The method, the model, the windows, and what the result depends on. Raises InputError for what is wrong.

    `identity` names everything that the output's bits follow from; `biases` says which drivers of the output
    have a bias (a stock family's own ones apart).
    """

    def __init__(self, options: PruneOptions, progress: Progress) -> None:
        self.start = perf_counter()
        self.method: Method = make_method(options.method, options.method_options)
        self.ratio = resolved_ratio(self.method, options.ratio)
        self.options, self.progress = options, progress
        self.device = distributed.own_device(options.device)
        self.reader = CheckpointReader(checkpoint_folder(options.model))
        self.dtype = select_dtype(options.dtype, self.reader.dtype, self.device)
        self.method.check(self.reader.shapes, self.ratio)
        self.method.check_layers(self.reader.family, self.reader.config)
        self.cache = (options.cache or options.output.absolute().parent / ".pyprune-cache").absolute()
        check_place(self.cache / "survey")
        self.biases = {
            name: self.method.biased or bool(getattr(self.reader.config, name, False))
            for name in ("o_proj_bias", "down_proj_bias")
        }
        self.memory = self._memory()
        self.recompute = self._recompute()
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
            "ratio": self.ratio,
            "calibration": self.text_fingerprint,
            "dtype": str(self.dtype),
            "device": self.device.type,
            "backends": self.backends,
            "allow_nonfinite": options.allow_nonfinite,
            "batch": self.memory.batch,
            "torch": torch.__version__,
        }
        if distributed.world_size() > 1:  # sums over blocks of windows round otherwise than a sum over all
            self.identity["processes"] = distributed.world_size()

    def forward(self, samples: int | None = None) -> LayerForward:
        """Over all windows, or over the first `samples`; of several processes each has its block of them."""
        assert self.windows is not None
        windows = distributed.own_windows(self.windows[:samples])
        memory, nonfinite = self.memory, self.options.allow_nonfinite
        return LayerForward(self.reader, windows, self.device, self.dtype, nonfinite, memory.batch, memory.on_device)

    def loader(self) -> LayerLoader:
        """What hands the stored layers over, one after the other, to a pass."""
        return LayerLoader(self.reader, self.device)

    def _memory(self) -> MemoryPlan:
        """How the run is cut: within --device-memory, or what the device has free. InputError where nothing fits."""
        budget, o = self.options.device_memory, self.options
        if self.device.type != "cuda":
            if budget is not None:
                raise InputError("--device-memory is for a CUDA device; this run is on the CPU")
            return MemoryPlan(micro_batch(self.device, o.sequence_length), 2)
        total = torch.cuda.get_device_properties(self.device).total_memory
        if budget is None:
            budget = whole_memory(self.device)
        sizes = Sizes(
            self.reader.shapes,
            self.method,
            self.ratio,
            o.samples,
            o.sequence_length,
            self.dtype.itemsize,
            self.reader.dtype.itemsize,
            distributed.world_size(),
        )
        # A resumed run has to go on with its batches: sums over others round otherwise.
        begun = distributed.from_first(lambda: begun_identity(o.output)) if o.resume else {}
        return plan_memory(sizes, distributed.smallest(min(budget, total)), begun.get("batch"))

    def _recompute(self) -> bool:
        """Of a method that trains: whether activations are computed again going backward. InputError: it cannot."""
        if not isinstance(self.method, LearnedMethod):
            return False
        if distributed.world_size() > 1:
            raise InputError(f"{self.method.name} trains in one process: start it without torchrun")
        memory = training_memory(self.reader, self.method, self.options.sequence_length, self.dtype)
        budget = self.options.device_memory or whole_memory(self.device)
        return check_fits(memory, budget, self.method.name)

    def cache_file(self, kind: str, operators: tuple[str, ...], **what: Any) -> tuple[Path, dict[str, Any]]:
        """Where statistics of this model and text are kept, and what their numbers follow from.

        `operators`: those that they were computed by; `what`: everything else that they depend on.
        """
        names = ("model", "calibration", "dtype", "device", "allow_nonfinite", "batch", "torch", "processes")
        identity = {name: self.identity[name] for name in names if name in self.identity}
        identity |= {"backends": {name: self.backends[name] for name in (*operators, *FORWARD_OPERATORS)}} | what
        return self.cache / f"{kind}-{digest(identity)}.safetensors", identity

    def _backends(self) -> dict[str, str]:
        """The backend of every operator that the forward and the method use: results follow from it to the last bit."""
        chosen = {}
        for operator in (*self.method.operators, *FORWARD_OPERATORS):
            # Which kernel runs may depend on sizes: those of the whole job are named by its shapes and this choice.
            dtype = self.dtype if operator in ACTIVATION_OPERATORS else torch.float32
            sample = torch.empty(1, 8, dtype=dtype, device=self.device)
            shape = None if operator in ACTIVATION_OPERATORS else (1, 1)
            chosen[operator] = backends.choose_backend(operator, sample, shape)
            tuned = operator_fingerprint(operator, self.device) if chosen[operator] == "triton" else None
            if tuned is not None:  # another configuration sums in another order
                chosen[operator] += f", tuned {tuned}"
        return chosen

    def _windows(self) -> Tensor:
        o, config = self.options, self.reader.config
        if o.calibration is None:
            raise InputError(
                f"method {self.method.name} looks at activations: give --calibration FILE (.txt or .jsonl), "
                f"or --calibration {SELF} for text sampled from the model itself"
            )
        distributed.check_windows(o.samples)
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
        with distributed.first_ahead():  # the other processes then find the file
            if path.is_file():
                return load_windows(path)
            windows = make()
            save_windows(path, windows)
            return windows
