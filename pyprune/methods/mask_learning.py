"""Methods that train masks on the whole frozen model; it must fit the device."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from .base import Method, Training
from .options import option


def learning_rate_option(default: float, optimizer: str) -> Any:
    return option(default, above=0, help=f"Of {optimizer}.")


@dataclass(frozen=True)
class LearnedMethod(Method):
    """A method that trains masks on the whole frozen model: it must fit the device."""

    steps: int = option(1500, minimum=1, help="Steps of training.")
    rows: int = option(1, minimum=1, help="Calibration windows in a step.")
    learning_rate: float = learning_rate_option(1e-3, "AdamW")

    @property
    def training(self) -> Training:
        return self

    @property
    @abstractmethod
    def backward(self) -> bool:
        """Whether training needs gradients through the model, not forwards alone."""
