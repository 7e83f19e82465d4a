"""The one place that touches TRL's private API, held by `tests/alignment_pipeline/test_trl_adapter.py`.

1. TRL's fused language-model head scores every position on a CPU and only the labelled ones on a GPU. Scoring the
   labelled ones everywhere gives the same loss and gradients and takes less than half the time.
2. On a CPU that head computes its logits twice, for the loss and for the gradients, and goes over them some ten times,
   for statistics that nobody reads. `_HeadLogprobs` computes them once. TRL's stays where it has a kernel, on a GPU.
3. DPOTrainer cannot take rows that are tokenized already, and recomputes reference log-probabilities whenever its
   configuration changes. `TokenizedDPOTrainer` takes both as columns.
"""

from typing import Any

import torch
import trl.trainer.utils
from trl import DPOTrainer

UNMEASURED = ("entropy", "logits/chosen", "logits/rejected")
"""What TRL logs as zero, since the head leaves it out."""

_HEAD_ROWS = 256  # tokens whose logits are computed at once: they stay in the processor's cache
_THEIRS = trl.trainer.utils._ChunkedLogProbFunction

PerToken = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""Log-probabilities, entropies, log of the sum of squared probabilities, mean logits, and whether likeliest."""


def make_head_fast() -> None:
    """Make TRL's fused head skip positions without a label on every device, and use our product on a CPU."""
    for name in ("_use_triton", "_ChunkedLogProbFunction"):
        if not hasattr(trl.trainer.utils, name):
            raise ImportError(
                f"trl.trainer.utils has no {name}: this TRL version needs a new adapter (see trl_adapter)."
            )
    trl.trainer.utils._use_triton = lambda device: True
    trl.trainer.utils._ChunkedLogProbFunction = _Head


class _Head:
    """Stands where TRL has its autograd function."""

    @staticmethod
    def apply(
        hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
        temperature: float, chunk_size: int, final_logit_softcapping: float | None, logit_scale: float,
        outputs: tuple[str, ...],
    ) -> PerToken:  # fmt: skip
        """Log-probabilities (N,) of targets (N,) by hidden states (N, H) and the head's weight (V, H)."""
        is_plain = temperature == 1 and final_logit_softcapping is None and logit_scale == 1
        if hidden.device.type != "cpu" or not is_plain:
            found: PerToken = _THEIRS.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
            return found
        logprobs, is_top1 = _HeadLogprobs.apply(hidden, weight, bias, targets)  # type: ignore[no-untyped-call]
        zeros = torch.zeros_like(logprobs)
        return logprobs, zeros, zeros, zeros, is_top1


class _HeadLogprobs(torch.autograd.Function):
    """Log-probabilities of tokens. Their log-softmax, (N, V) in float32, is kept for the backward pass."""

    @staticmethod
    def forward(
        context: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else hidden.dtype
        columns, kept, logprobs, is_top1 = weight.to(dtype).t(), [], [], []
        parts = (torch.split(part, _HEAD_ROWS) for part in (hidden.to(dtype), targets))
        for rows, tokens in zip(*parts, strict=True):
            logits = rows @ columns if bias is None else torch.addmm(bias.to(dtype), rows, columns)
            log_softmax = logits.float().log_softmax(-1)
            chosen = log_softmax.gather(-1, tokens[:, None])
            logprobs.append(chosen.squeeze(-1))
            is_top1.append((chosen >= log_softmax.amax(-1, keepdim=True)).squeeze(-1))
            kept.append(log_softmax)
        context.dtype, context.log_softmax = dtype, kept
        context.save_for_backward(hidden, weight, targets)
        top1 = torch.cat(is_top1)
        context.mark_non_differentiable(top1)
        return torch.cat(logprobs), top1

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """d log p[target] / d logit_v = 1{v = target} - p_v, times the head's weight and the hidden states."""
        hidden, weight, targets = context.saved_tensors
        dtype, needs_weight, needs_bias = context.dtype, context.needs_input_grad[1], context.needs_input_grad[2]
        low = weight.to(dtype)
        to_hidden = []
        to_weight = torch.zeros_like(weight) if needs_weight else None
        to_bias = torch.zeros(len(weight)) if needs_bias else None
        parts = (torch.split(part, _HEAD_ROWS) for part in (hidden, targets, gradients[0]))
        for log_softmax, rows, tokens, wanted in zip(context.log_softmax, *parts, strict=True):
            gradient = log_softmax.exp().mul_(-wanted[:, None])
            gradient.scatter_add_(-1, tokens[:, None], wanted[:, None])
            to_hidden.append((gradient.to(dtype) @ low).to(hidden.dtype))
            if to_weight is not None:
                to_weight.addmm_(gradient.t(), rows.float())
            if to_bias is not None:
                to_bias += gradient.sum(0)
        return torch.cat(to_hidden), to_weight, to_bias, None


class TokenizedDPOTrainer(DPOTrainer):  # type: ignore[misc]  # trl is untyped here
    """DPOTrainer over rows with prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps and ref_rejected_logps."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset
