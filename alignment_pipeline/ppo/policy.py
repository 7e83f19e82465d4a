"""Policy, reference policy, value model and reward model on one trunk.

With LoRA all four are one model in memory: the policy is the trunk with its adapter, the reference the trunk without,
a reward model that was trained with LoRA on the same trunk is the trunk with that adapter, and the values are a linear
head on the policy's last hidden state (or, with `value_trunk: separate`, on the trunk with an adapter of their own).
With full fine-tuning the reference (and a separate value trunk) is a copy. The value head starts at zero.

Shapes: `B` responses, `T` response columns, `N` response tokens of a batch in row order.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.models import POLICY_ADAPTER, add_reward_adapter, lora_config, with_adapter
from alignment_pipeline.sequences import (
    TokenBatch,
    apply_head,
    causal_lm_of,
    chosen_logprobs,
    in_columns,
    response_hidden,
    response_tokens,
)

_VALUE_ADAPTER = "value"
_REWARD_ADAPTER = "reward"


@dataclass(frozen=True)
class Evaluation:
    """What the policy says of a batch of responses: each (B, T), zero where a response has ended."""

    logprobs: torch.Tensor
    logprobs_at_1: torch.Tensor
    values: torch.Tensor
    entropies: torch.Tensor


class PolicyWithValue:
    """The trained model, its value model, and a way to see it as it was before training."""

    def __init__(self, trunk: Any, config: PpoConfig, reward_adapter: Path | None = None) -> None:
        self._config = config
        self._frozen = copy.deepcopy(trunk).requires_grad_(False) if config.method == "full" else None
        self._value_trunk = None
        if config.value_trunk == "separate" and config.method == "full":
            self._value_trunk = copy.deepcopy(causal_lm_of(trunk).base_model)
        self.model = with_adapter(trunk, config, "CAUSAL_LM")
        self.model.eval()  # no dropout in rollouts or updates; gradients flow all the same
        self._value_adapter = config.value_trunk == "separate" and config.method == "lora"
        self._score_head: torch.nn.Module | None = None
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        if self._value_adapter:
            self.model.add_adapter(_VALUE_ADAPTER, lora_config(config, "CAUSAL_LM"))
        if reward_adapter is not None:
            self._score_head = add_reward_adapter(self.model, reward_adapter, _REWARD_ADAPTER)
        hidden_size = causal_lm_of(self.model).get_output_embeddings().in_features
        self.value_head = torch.nn.Linear(hidden_size, 1).to(trunk.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self._trained_values = [*self._named_value_parameters().values()]
        self._restore_gradients()
        self._active = self.model

    @property
    def device(self) -> str:
        """Where the model lies."""
        return str(self.model.device)

    @property
    def holds_reward_adapter(self) -> bool:
        """Whether `reward_scores` can be asked."""
        return self._score_head is not None

    def policy_parameters(self) -> list[torch.nn.Parameter]:
        """What is trained of the policy, in a fixed order."""
        return self._trained

    def value_parameters(self) -> list[torch.nn.Parameter]:
        """What is trained for the values alone, in a fixed order."""
        return self._trained_values

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Names and tensors of all that is trained, for a checkpoint."""
        trained = {id(parameter) for parameter in self._trained}
        policy = {name: p.detach() for name, p in self.model.named_parameters() if id(p) in trained}
        return policy | {name: p.detach() for name, p in self._named_value_parameters().items()}

    def load_trained_state(self, state: dict[str, torch.Tensor]) -> None:
        """Inverse of `trained_state`."""
        with torch.no_grad():
            for name, tensor in self.trained_state().items():
                tensor.copy_(state[name])

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within, the policy is the trunk as it was before training."""
        if self._frozen is None:
            try:
                with self.model.disable_adapter():
                    yield
            finally:
                self._restore_gradients()
        else:
            self._active = self._frozen
            try:
                yield
            finally:
                self._active = self.model

    def evaluate(
        self, batch: TokenBatch, temperature: float, *, all_statistics: bool = True, only_values: bool = False
    ) -> Evaluation:
        """Log-probabilities, values and entropies of a batch's responses.

        A token's value is read where the token is predicted, before it is seen.

        Args:
            batch: Prompts and responses.
            temperature: Divides the logits.
            all_statistics: False leaves out entropies (0) and log-probabilities at temperature 1 (those at the
                temperature), which saves two passes over the logits.
            only_values: No gradient reaches the policy, as in the value model's warm-up.
        """
        tokens = response_tokens(batch)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not only_values):
            hidden = response_hidden(self._active, batch)
            logits = self._logits(hidden, temperature)
            logprobs = chosen_logprobs(logits, tokens)
            entropies = entropies_of(logits) if all_statistics else torch.zeros_like(logprobs)
        with torch.no_grad():
            untempered = all_statistics and temperature != 1
            at_1 = chosen_logprobs(logits * temperature, tokens) if untempered else logprobs.detach()
        found = (logprobs, at_1, self._values(batch, hidden), entropies)
        return Evaluation(*(in_columns(per_token, batch) for per_token in found))

    @torch.no_grad()
    def reference_logprobs(self, batch: TokenBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's log-probabilities (B, T) at a temperature, and at temperature 1."""
        with self.as_reference():
            hidden, tokens = response_hidden(self._active, batch), response_tokens(batch)
            logits = self._logits(hidden, temperature)
        logprobs = chosen_logprobs(logits, tokens)
        at_1 = logprobs if temperature == 1 else chosen_logprobs(logits.mul_(temperature), tokens)
        return in_columns(logprobs, batch), in_columns(at_1, batch)

    @torch.no_grad()
    def reward_scores(self, batch: TokenBatch) -> torch.Tensor:
        """Score (B,) of each response by the reward adapter on the shared trunk, read at its last token."""
        if self._score_head is None:
            raise ValueError("this policy holds no reward adapter")
        with self._using(_REWARD_ADAPTER):
            hidden = causal_lm_of(self.model).base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        last = batch.attention_mask.sum(1) - 1
        scores: torch.Tensor = self._score_head(hidden[torch.arange(len(last), device=last.device), last]).squeeze(-1)
        return scores.float()

    def _logits(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """Logits (N, V) at a temperature; without a bias the smaller tensor, the hidden states, is divided."""
        if causal_lm_of(self._active).get_output_embeddings().bias is None:
            return apply_head(self._active, hidden / temperature)
        return apply_head(self._active, hidden) / temperature

    def _values(self, batch: TokenBatch, hidden: torch.Tensor) -> torch.Tensor:
        """Values (N,); `hidden` is the policy's."""
        if self._value_adapter:
            with self._using(_VALUE_ADAPTER):
                hidden = response_hidden(self.model, batch)
        elif self._value_trunk is not None:
            states = self._value_trunk(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            hidden = states[:, :-1][batch.response_mask[:, 1:]]
        elif self._config.value_trunk == "detached":
            hidden = hidden.detach()
        values: torch.Tensor = self.value_head(hidden.float()).squeeze(-1)
        return values

    @contextlib.contextmanager
    def _using(self, adapter: str) -> Iterator[None]:
        """Another adapter than the policy's on the trunk."""
        self.model.set_adapter(adapter)
        self._restore_gradients()
        try:
            yield
        finally:
            self.model.set_adapter(POLICY_ADAPTER)
            self._restore_gradients()

    def _restore_gradients(self) -> None:
        """PEFT lets gradients flow to the active adapter only, and takes them away with it."""
        for parameter in (*self._trained, *self._trained_values):
            parameter.requires_grad_(True)
        if self._score_head is not None:
            for name, parameter in self.model.named_parameters():
                if f".{_REWARD_ADAPTER}." in name:
                    parameter.requires_grad_(False)

    def _named_value_parameters(self) -> dict[str, torch.nn.Parameter]:
        named = dict(self.value_head.named_parameters("value_head"))
        if self._value_adapter:
            named |= {name: p for name, p in self.model.named_parameters() if f".{_VALUE_ADAPTER}." in name}
        if self._value_trunk is not None:
            named |= dict(self._value_trunk.named_parameters("value_trunk"))
        return named


def entropies_of(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each distribution: (N, V) → (N,)."""
    log_softmax = logits.log_softmax(-1)
    return -(log_softmax.exp() * log_softmax).sum(-1)
