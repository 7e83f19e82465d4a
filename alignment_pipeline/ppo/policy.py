"""Policy, reference policy and value head on one trunk.

With LoRA the reference is the same trunk with adapters off; with full fine-tuning it is a frozen copy. The value head
is linear on the trunk's last hidden state and starts at zero.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.models import with_adapter
from alignment_pipeline.sequences import (
    TokenBatch,
    apply_head,
    causal_lm_of,
    chosen_logprobs,
    response_hidden,
    response_tokens,
)


class PolicyWithValue:
    """The trained model, its value head, and a way to see it as it was before training."""

    def __init__(self, trunk: Any, config: PpoConfig) -> None:
        self._frozen = copy.deepcopy(trunk).requires_grad_(False) if config.method == "full" else None
        self.model = with_adapter(trunk, config, "CAUSAL_LM")
        self.model.eval()  # no dropout in rollouts or updates; gradients flow all the same
        self.device: str = str(trunk.device)
        hidden_size = causal_lm_of(self.model).get_output_embeddings().in_features
        self.value_head = torch.nn.Linear(hidden_size, 1).to(trunk.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self._active = self.model

    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer trains, in a fixed order."""
        return [p for p in (*self.model.parameters(), *self.value_head.parameters()) if p.requires_grad]

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Names and tensors of what is trained, for a checkpoint."""
        named = (*self.model.named_parameters(), *self.value_head.named_parameters("value_head"))
        return {name: parameter.detach() for name, parameter in named if parameter.requires_grad}

    def load_trained_state(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `trained_state`."""
        with torch.no_grad():
            for name, tensor in self.trained_state().items():
                tensor.copy_(state[name])

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within, `evaluate` sees the trunk as it was before training."""
        if self._frozen is None:
            with self.model.disable_adapter():
                yield
        else:
            self._active = self._frozen
            try:
                yield
            finally:
                self._active = self.model

    def evaluate(self, batch: TokenBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities, values and entropies, each (B, T) and zero outside the response mask.

        A token's value is read where the token is predicted, before it is seen.
        """
        hidden = response_hidden(self._active, batch)
        logits = apply_head(self._active, hidden) / temperature
        logprobs = chosen_logprobs(logits, response_tokens(batch))
        values = self.value_head(hidden).squeeze(-1)
        with torch.no_grad():
            log_softmax = logits.log_softmax(-1)
            entropies = -(log_softmax.exp() * log_softmax).sum(-1)
        mask = batch.response_mask
        spread = [
            torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, x) for x in (logprobs, values, entropies)
        ]
        return spread[0], spread[1], spread[2]

    def evaluate_in_parts(
        self, batch: TokenBatch, parts: Sequence[torch.Tensor], temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and values (B, T) of the whole batch, some rows at a time."""
        logprobs = torch.zeros(batch.input_ids.shape, device=batch.input_ids.device)
        values = torch.zeros_like(logprobs)
        for rows in parts:
            part = batch.rows(rows)
            width = part.input_ids.shape[1]
            logprobs[rows, :width], values[rows, :width], _ = self.evaluate(part, temperature)
        return logprobs, values
