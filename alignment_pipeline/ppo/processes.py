"""The processes that train together, through accelerate: one by default, several under torchrun.

Every process holds the whole rollout and its own share of the work; what they exchange is texts, sums and gradients.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce

from alignment_pipeline.errors import ModelError
from alignment_pipeline.progress import ProgressLog

T = TypeVar("T")


class Processes:
    """This process among those that train together."""

    def __init__(self, device: str = "cpu") -> None:
        self._state = PartialState(cpu=device == "cpu")
        self.count: int = self._state.num_processes
        self.is_main: bool = self._state.is_main_process
        self.device = str(self._state.device) if self.count > 1 else device

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of items that all hold: every `count`-th, so that lengths are spread evenly."""
        return list(items[self._state.process_index :: self.count])

    def gather(self, shares: list[T], length: int) -> list[T]:
        """Inverse of `share`: all `length` items, in their order, in every process."""
        if self.count == 1:
            return shares
        by_process = gather_object([shares])
        return [by_process[index % self.count][index // self.count] for index in range(length)]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of the processes' tensors, the same in every process."""
        if self.count == 1:
            return tensor
        total: torch.Tensor = reduce(tensor, "sum")
        return total

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace gradients by their sums over the processes, in one exchange."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = self.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def require_same(self, what: str, value: int) -> None:
        """Stop every process if they do not agree on a number, before they wait for each other in vain.

        Raises:
            ModelError: They do not.
        """
        values = self.gather([value], self.count)
        if len(set(values)) > 1:
            raise ModelError(
                f"The processes found different numbers of {what} ({values}), expected the same. "
                "Give all of them the same work folder."
            )

    def wait(self) -> None:
        """Return when every process is here."""
        self._state.wait_for_everyone()

    def log_of_main(self, log: ProgressLog) -> ProgressLog:
        """The log in the main process; one that nobody reads in the others."""
        return log if self.is_main else ProgressLog(Path(os.devnull))
