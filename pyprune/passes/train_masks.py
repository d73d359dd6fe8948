"""The passes of methods that train masks on the whole frozen model: train, then cut layer by layer."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..allocation.budget import choose_globally, total_cost
from ..architectures.channel_selection import FFN_MIDDLE, SELECTIONS, ChannelSelection, select_layer, width
from ..checkpoint import CheckpointWriter
from ..checkpoint.finite import check_finite
from ..checkpoint.headers import on_meta
from ..checkpoint.load_model import load_model
from ..job.entries import selection_entry
from ..job.job import Job
from ..job.result import PruneResult, SelectionResult, UnitResult
from ..mask_training.budget import select
from ..mask_training.disp_learner import SelectionLearner
from ..mask_training.gates import GATES
from ..mask_training.importance import gradient_importance, moment_importance, prior_logits
from ..mask_training.masked_model import MaskedModel
from ..mask_training.policy_learner import UnitLearner, start_logits
from ..mask_training.training import FILE, Learner, train
from ..methods import LearnedMethod
from ..methods.disp import Disp
from ..methods.policy import Policy
from ..runtime.device import Meter
from .base import Passes, build_dense, stored_layers
from .refit import Refit
from .slice import SlicingPasses

IMPORTANCE = {"gradients": gradient_importance, "moments": moment_importance}


def training_file(writer: CheckpointWriter) -> Path | None:
    return writer.own_file(FILE)


def masked_model(job: Job) -> MaskedModel:
    """The whole model on the device, in the compute type, frozen."""
    model = load_model(job.reader.origin, job.device, job.dtype)
    check_finite({name: p for name, p in model.named_parameters() if not _is_table(model, p)}, str(job.reader.origin))
    return MaskedModel(model, job.reader.family, job.recompute)


def _is_table(model: Any, parameter: nn.Parameter) -> bool:
    """Embeddings: rows that no text uses may be NaN, and those that one uses were looked at."""
    return parameter is model.get_input_embeddings().weight


def train_masks(passes: Passes, learner: Learner, method: LearnedMethod) -> None:
    """Train to the end, from where a killed run stopped; `passes` gets the history."""
    job = passes.job
    file = training_file(passes.writer)
    passes.history = train(learner, method.steps, method.rows, job.options.seed, file, job.progress)


class SelectionPasses(Passes):
    """DISP-LLM: gates are trained, projected to the ratio, and each layer's matrices gathered."""

    def __init__(self, job: Job, writer: CheckpointWriter, method: Disp) -> None:
        super().__init__(job, writer)
        self.method = method

    def decide(self) -> PruneResult:
        meter = self.meters["train"] = Meter(self.device)
        with meter.layer():
            logits = self._trained()
        selections = select(self.reader.shapes, logits, self.job.ratio, self.method.round_to)
        self._write_selections(selections, logits)
        return SelectionResult(selections, logits)

    def _trained(self) -> list[dict[str, Tensor]]:
        """Logits of all gates after training."""
        assert self.job.windows is not None
        shapes, method = self.reader.shapes, self.method
        masked = masked_model(self.job)
        windows = self.job.windows.to(self.device)
        learner = SelectionLearner(
            masked,
            shapes,
            windows,
            self.job.ratio,
            self._prior(masked, windows),
            GATES[method.gate],
            method.learning_rate,
            method.budget_weight,
            self.job.options.seed,
        )
        train_masks(self, learner, method)
        return learner.logits()

    def _prior(self, masked: MaskedModel, windows: Tensor) -> list[dict[str, Tensor]] | None:
        """Initial logits of the gates; zeros where a killed run's state replaces them."""
        shapes, kind = self.reader.shapes, self.method.warm_start
        if kind == "none":
            return None
        file = training_file(self.writer)
        if file is not None and file.is_file():
            return [{name: torch.zeros(width(shape, name)) for name in SELECTIONS} for shape in shapes]
        importance = IMPORTANCE[kind](
            masked,
            shapes,
            windows[: self.method.warm_windows],
            lambda done, total: self.job.progress("warm start", done, total),
        )
        return prior_logits(shapes, importance, self.job.ratio, by_selection=kind == "moments")

    def _write_selections(self, selections: list[ChannelSelection], logits: list[dict[str, Tensor]]) -> None:
        """Each layer with what is not selected cut out, and the indices of its selections."""
        meter = self.meters["prune"] = Meter(self.device)
        family = self.reader.family
        refit = Refit(self.job.forward()) if self.method.compensation == "weights" else None
        self._lay_out_selected(selections)
        self.copy_embeddings()
        for layer, source in stored_layers(self.job, "prune", meter):
            selection = selections[layer]
            record = selection_entry(selection, logits[layer])
            fitted = {}
            if refit is not None:  # of a layer that is there already too: its output is what the next one reads
                with meter.stage("refit"):
                    fitted = refit.layer(build_dense(self.job, refit.forward, source, layer), layer, selection)
            if self.writer.record(layer + 1) != record:
                with meter.stage("rewrite"):
                    tensors = select_layer(family, source, selection)
                    tensors |= {name: new.to(tensors[name].dtype) for name, new in fitted.items()}
                    self.write_layer(layer, tensors | index_tensors(selection, self.device), record)
        self.copy_head()

    def _lay_out_selected(self, selections: list[ChannelSelection]) -> None:
        meta = torch.device("meta")
        layers = []
        for layer, selection in enumerate(selections):
            stored = on_meta(self.reader.layer_tensors(layer))
            layers.append(select_layer(self.reader.family, stored, selection) | index_tensors(selection, meta))
        self.lay_out(layers, {})


class PolicyPasses(SlicingPasses):
    """Calibrate, learn keep-probabilities from the scores on, then slice and add biases as a scoring method does."""

    def __init__(self, job: Job, writer: CheckpointWriter, method: Policy) -> None:
        super().__init__(job, writer)
        self.method = method

    def decide(self) -> PruneResult:
        assert self.job.windows is not None
        shapes, ratio = self.reader.shapes, self.job.ratio
        scoring = self.method.scoring
        statistics_by_layer = self._calibrate(scoring.by_window)
        start = start_logits(scoring.scores(statistics_by_layer, shapes), comparable=self.method.start == "flap")
        meter = self.meters["train"] = Meter(self.device)
        with meter.layer():
            masked, windows = masked_model(self.job), self.job.windows.to(self.device)
            learner = UnitLearner(
                masked, shapes, windows, ratio, start, self.method.learning_rate, self.job.options.seed
            )
            train_masks(self, learner, self.method)
            scores = learner.scores()
            del masked, learner  # the next pass needs only a layer at a time
        choice = choose_globally(scores, shapes, ratio * total_cost(shapes))
        self._prune_by_choice(choice, scores, statistics_by_layer)
        return UnitResult(choice, scores)


def index_tensors(selection: ChannelSelection, device: torch.device) -> dict[str, Tensor]:
    """The indices that a layer's forward needs, int32, named within the layer."""
    return {name: kept.to(device, torch.int32) for name, kept in selection.items() if name != FFN_MIDDLE}
