"""Scores of a reward model for prompt and response, and the baseline it has to beat."""

from collections.abc import Sequence
from typing import Any

import torch

from alignment_pipeline.sequences import TokenBatch, by_length, pack
from alignment_pipeline.tokenization import TokenIds


def batch_scores(model: Any, batch: TokenBatch) -> torch.Tensor:
    """Score (B,) of each prompt and response, read at its last token."""
    scores: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits[:, 0]
    return scores.float()


@torch.inference_mode()
def score_responses(
    model: Any, prompts: Sequence[TokenIds], responses: Sequence[TokenIds], pad_id: int, batch_size: int
) -> list[float]:
    """Score of each response, in order. A complete response carries the end token, as in the model's training."""
    scores: dict[int, float] = {}
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    for rows in by_length(lengths, batch_size):
        batch = pack([prompts[row] for row in rows], [responses[row] for row in rows], pad_id, model.device)
        scores.update(zip(rows, batch_scores(model, batch).tolist(), strict=True))
    return [scores[row] for row in range(len(lengths))]


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of pairs whose chosen response scores higher; ties count half."""
    wins = sum(1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(chosen, rejected, strict=True))
    return wins / len(chosen)


def length_baseline_accuracy(train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]]) -> float:
    """Held-out accuracy of preferring the longer (or the shorter) response, whichever the training pairs favour."""

    def prefers_longer(pairs: Sequence[dict[str, Any]]) -> float:
        return pair_accuracy([len(pair["chosen"]) for pair in pairs], [len(pair["rejected"]) for pair in pairs])

    accuracy = prefers_longer(held_out)
    return accuracy if prefers_longer(train) >= 0.5 else 1 - accuracy
