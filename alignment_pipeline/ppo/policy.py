"""Policy, reference policy, value model and reward model on one trunk.

With LoRA all four are one model in memory: the policy is the trunk with its adapter, the reference the trunk without,
a reward model that was trained with LoRA on the same trunk is the trunk with that adapter, and the values are a linear
head on the policy's last hidden state, or on the trunk with an adapter of their own (`value_trunk`: separate or
reward_model). With full fine-tuning the reference, and a value trunk of its own, are copies. The value head starts at
zero, or as the reward model's.

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
from alignment_pipeline.models import POLICY_ADAPTER, add_reward_adapter, autocast, lora_config, with_adapter
from alignment_pipeline.sequences import (
    HEAD_ROWS,
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

    def __init__(
        self, trunk: Any, config: PpoConfig, reward_adapter: Path | None = None, reward_model: Any = None
    ) -> None:
        """Make a policy of a trunk, which is changed in place.

        Args:
            trunk: Causal language model.
            config: Of the stage.
            reward_adapter: Artifact of a reward model that was trained with LoRA on the trunk; it moves in.
            reward_model: A reward model that stays apart; read only where values start as the reward model.
        """
        self._config = config
        self._frozen = copy.deepcopy(trunk).requires_grad_(False) if config.method == "full" else None
        own_copy, own_adapter = own_value_model(config, reward_adapter is not None)
        source = reward_model if config.value_trunk == "reward_model" else causal_lm_of(trunk)
        if own_copy and source is None:
            raise ValueError("value_trunk is reward_model, expected a reward model to start from")
        self._value_trunk = copy.deepcopy(source.base_model).requires_grad_(True) if own_copy else None
        self.model = with_adapter(trunk, config, "CAUSAL_LM")
        self.model.eval()  # no dropout in rollouts or updates; gradients flow all the same
        self._trained = [p for p in self.model.parameters() if p.requires_grad]
        self._score_head: torch.nn.Linear | None = None
        if reward_adapter is not None:
            self._score_head = add_reward_adapter(self.model, reward_adapter, _REWARD_ADAPTER)
        self._value_adapter = own_adapter
        start = self._score_head if reward_model is None else reward_model.score
        if own_adapter and config.value_trunk == "reward_model" and reward_adapter is not None:
            add_reward_adapter(self.model, reward_adapter, _VALUE_ADAPTER)
        elif own_adapter:
            self.model.add_adapter(_VALUE_ADAPTER, lora_config(config, "CAUSAL_LM"))
        self.value_head = self._new_value_head(start if config.value_trunk == "reward_model" else None)
        self._trained_values = [*self._named_value_parameters().values()]
        self._restore_gradients()
        self._active = self.model

    def _new_value_head(self, start: torch.nn.Linear | None) -> torch.nn.Linear:
        """A head of zeros, or a copy of a score head: the value of a prefix is then the score that it would get."""
        lm_head = causal_lm_of(self.model).get_output_embeddings()
        head = torch.nn.Linear(lm_head.in_features if start is None else start.in_features, 1)
        with torch.no_grad():
            head.bias.zero_()
            head.weight.zero_()
            if start is not None and self._config.score_normalization == "none":  # else it has another unit
                head.weight.copy_(start.weight)
        return head.to(self.model.device)

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
        with torch.set_grad_enabled(torch.is_grad_enabled() and not only_values):
            hidden = self._response_hidden(self._active, batch)
            parts = [
                self._of_tokens(states, tokens, temperature, all_statistics)
                for states, tokens in zip(
                    torch.split(hidden, HEAD_ROWS), torch.split(response_tokens(batch), HEAD_ROWS), strict=True
                )
            ]
        logprobs, at_1, entropies = (torch.cat(column) for column in zip(*parts, strict=True))
        found = (logprobs, at_1, self._values(batch, hidden), entropies)
        return Evaluation(*(in_columns(per_token, batch) for per_token in found))

    def _of_tokens(
        self, hidden: torch.Tensor, tokens: torch.Tensor, temperature: float, all_statistics: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities at the temperature and at 1, and entropies, each (N,), of a few tokens."""
        logits = self._logits(hidden, temperature)
        logprobs = chosen_logprobs(logits, tokens)
        if not all_statistics:
            return logprobs, logprobs.detach(), torch.zeros_like(logprobs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._config.entropy_coef > 0):
            entropies = entropies_of(logits)
        with torch.no_grad():
            at_1 = logprobs.detach() if temperature == 1 else chosen_logprobs(logits * temperature, tokens)
        return logprobs, at_1, entropies

    @torch.no_grad()
    def reference_logprobs(self, batch: TokenBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's log-probabilities (B, T) at a temperature, and at temperature 1."""
        with self.as_reference():
            hidden, tokens = self._response_hidden(self._active, batch), response_tokens(batch)
            logprobs, at_1 = (
                torch.empty(len(tokens), device=hidden.device),
                torch.empty(len(tokens), device=hidden.device),
            )
            for start in range(0, len(tokens), HEAD_ROWS):
                few = slice(start, start + HEAD_ROWS)
                logits = self._logits(hidden[few], temperature)
                logprobs[few] = chosen_logprobs(logits, tokens[few])
                at_1[few] = (
                    logprobs[few] if temperature == 1 else chosen_logprobs(logits.mul_(temperature), tokens[few])
                )
        return in_columns(logprobs, batch), in_columns(at_1, batch)

    @torch.no_grad()
    def reward_scores(self, batch: TokenBatch) -> torch.Tensor:
        """Score (B,) of each response by the reward adapter on the shared trunk, read at its last token."""
        if self._score_head is None:
            raise ValueError("this policy holds no reward adapter")
        with self._using(_REWARD_ADAPTER), self._autocast():
            hidden = causal_lm_of(self.model).base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        last = batch.attention_mask.sum(1) - 1
        scores: torch.Tensor = self._score_head(
            hidden[torch.arange(len(last), device=last.device), last].float()
        ).squeeze(-1)
        return scores

    def _logits(self, hidden: torch.Tensor, temperature: float) -> torch.Tensor:
        """Logits (N, V) at a temperature; without a bias the smaller tensor, the hidden states, is divided."""
        with self._autocast():
            if causal_lm_of(self._active).get_output_embeddings().bias is None:
                return apply_head(self._active, hidden / temperature)
            return apply_head(self._active, hidden) / temperature

    def _response_hidden(self, model: Any, batch: TokenBatch) -> torch.Tensor:
        with self._autocast():
            return response_hidden(model, batch)

    def _autocast(self) -> torch.autocast:
        return autocast(self._config.precision, torch.device(self.device).type)

    def _values(self, batch: TokenBatch, hidden: torch.Tensor) -> torch.Tensor:
        """Values (N,); `hidden` is the policy's."""
        if self._value_adapter:
            with self._using(_VALUE_ADAPTER):
                hidden = self._response_hidden(self.model, batch)
        elif self._value_trunk is not None:
            with self._autocast():
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


def own_value_model(config: PpoConfig, reward_on_trunk: bool) -> tuple[bool, bool]:
    """Whether the values have a copy of a trunk of their own, and whether they have an adapter of their own."""
    if config.value_trunk not in ("separate", "reward_model"):
        return False, False
    adapter = config.method == "lora" and (config.value_trunk == "separate" or reward_on_trunk)
    return not adapter, adapter


def entropies_of(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each distribution: (N, V) → (N,)."""
    log_softmax = logits.log_softmax(-1)
    return -(log_softmax.exp() * log_softmax).sum(-1)
