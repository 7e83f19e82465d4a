"""Training batches with little padding: which rows share a step, and which of a step's rows share a forward pass.

Belongs here: what makes padding cost less and leaves the loss as it is, for any trunk. Making batches is in `sequences`
for our own loops and in TRL's collators for its trainers; both pad on the right.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from alignment_pipeline.errors import ModelError

_WINDOW_STEPS = 50  # steps among whose rows the similar ones are looked for
_LEAST_WINDOWS = 4  # a pass over few rows has several windows all the same, so that batches differ between passes
PASS_TOKENS = 64
"""Tokens of padding that one more forward pass is worth on a CPU."""
_GPU_PASS_TOKENS = 4096
"""The same on a GPU, which starts thousands of kernels a pass; estimated, not measured."""


def order_by_length(lengths: Sequence[int], step_rows: int, rows: int, seed: int) -> list[int]:
    """Row numbers in the order of training: rows of a step are similarly long, the order of steps is random.

    Every pass over the rows is in another order. Of a pass that fills no last step, what is left over comes first in
    the next one's draw, so that every step but the very last is full.

    Args:
        lengths: Tokens of each row.
        step_rows: Rows an optimizer step.
        rows: Length of the order: so many times the rows as there are passes.
        seed: Of the order.
    """
    draw = random.Random(f"order by length/{seed}")
    window = step_rows * max(1, min(_WINDOW_STEPS, len(lengths) // (_LEAST_WINDOWS * step_rows)))
    order: list[int] = []
    left: list[int] = []
    while len(order) + len(left) < rows:
        drawn = left + draw.sample(range(len(lengths)), len(lengths))
        full = len(drawn) - len(drawn) % step_rows
        left = drawn[full:]
        steps: list[list[int]] = []
        for start in range(0, full, window):
            similar = sorted(drawn[start : min(start + window, full)], key=lambda row: lengths[row])
            steps += [similar[first : first + step_rows] for first in range(0, len(similar), step_rows)]
        draw.shuffle(steps)
        order += [row for step in steps for row in step]
    return (order + left)[:rows]


def passes(lengths: Sequence[int], pass_tokens: int = PASS_TOKENS) -> list[list[int]]:
    """Split a batch's rows into forward passes so that padding and passes together cost least.

    Args:
        lengths: Tokens of each row.
        pass_tokens: Cost of a pass, in padding tokens.

    Returns:
        Row numbers of each pass, shorter rows first.
    """
    rows = sorted(range(len(lengths)), key=lambda row: lengths[row])
    best: list[tuple[int, int]] = [(0, 0)]  # by number of rows: least cost, and where its last pass starts
    for end in range(1, len(rows) + 1):
        longest = lengths[rows[end - 1]]
        best.append(min((best[start][0] + (end - start) * longest + pass_tokens, start) for start in range(end)))
    found: list[list[int]] = []
    end = len(rows)
    while end:
        start = best[end][1]
        found.insert(0, rows[start:end])
        end = start
    return found


@contextlib.contextmanager
def without_padding(trunk: Any) -> Iterator[None]:
    """Within, the trunk computes a right-padded batch in passes of similarly long rows, each as short as its longest.

    Hidden states at real tokens are what they are otherwise, up to rounding; at padding they are zero. No pass has an
    attention mask: real tokens cannot see what is on their right, and without a mask attention takes its fast path.

    A trunk that reads in both directions is left as it is: it needs the mask, and may give more than hidden states.

    Args:
        trunk: The model without a head, as a transformers model's `base_model`; may be inside a PEFT model.
    """
    if not reads_only_backwards(trunk):
        yield
        return
    trunk.forward = _in_passes(trunk.forward)
    try:
        yield
    finally:
        del trunk.forward  # the class's own again


def _in_passes(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(input_ids: torch.Tensor | None = None, attention_mask: Any = None, **options: Any) -> Any:
        is_batch = input_ids is not None and attention_mask is not None and options.get("position_ids") is None
        if input_ids is None or not is_batch or not bool(attention_mask[:, 0].all()):
            return original(input_ids, attention_mask=attention_mask, **options)
        lengths = attention_mask.sum(1).tolist()
        groups = passes(lengths, _GPU_PASS_TOKENS) if input_ids.is_cuda else passes(lengths)
        states: list[torch.Tensor] = []
        for rows in groups:
            columns = max(lengths[row] for row in rows)
            found = original(input_ids[rows, :columns], **options).last_hidden_state
            states.append(torch.nn.functional.pad(found, (0, 0, 0, input_ids.shape[1] - columns)))
        place = torch.tensor([row for rows in groups for row in rows], device=input_ids.device).argsort()
        return BaseModelOutputWithPast(last_hidden_state=torch.cat(states)[place])

    return forward


@torch.inference_mode()
def reads_only_backwards(trunk: Any) -> bool:
    """Whether what follows a token leaves its hidden state alone, as in a decoder; found by trying."""
    token_ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 10]], device=trunk.device) % trunk.config.vocab_size
    hidden = trunk(input_ids=token_ids, attention_mask=torch.ones_like(token_ids)).last_hidden_state
    return torch.allclose(hidden[0, :2], hidden[1, :2], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def require_documents_apart(trunk: Any) -> None:
    """Refuse a trunk that reads from one document into the next where two are joined and positions start again.

    Raises:
        ModelError: It does; names the architecture.
    """
    documents = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]], device=trunk.device) % trunk.config.vocab_size
    positions = torch.arange(4, device=trunk.device).repeat(2)[None]
    apart = trunk(input_ids=documents, use_cache=False).last_hidden_state
    joined = trunk(input_ids=documents.view(1, -1), position_ids=positions, use_cache=False).last_hidden_state
    if not torch.allclose(joined.view_as(apart), apart, rtol=1e-3, atol=1e-4):
        raise ModelError(
            f"{type(trunk).__name__} reads across documents when they are packed: its hidden states differ from those "
            "of the documents apart. Set sft.packing=none, or use another architecture (GPT-2, Llama, Qwen)."
        )
