from pathlib import Path
from typing import Any

import pytest
import torch

from alignment_pipeline.models import new_scorer
from alignment_pipeline.reward import score_rows

ROUNDING = 1e-5  # batched and one-by-one matrix products add in another order, float32
# Not in the order of their lengths, by which batches are made.
PROMPTS = [[18, 5, 77, 42, 9, 130, 131], [91], [7, 12, 250, 33]]
RESPONSES = [[3, 9], [99, 98, 97, 96, 1], [44, 45, 1]]


@pytest.mark.parametrize("architecture", ["opt", "opt_projected", "gpt2", "llama"])
def test_a_score_is_the_heads_output_at_the_last_token_whatever_the_batch(
    tmp_path: Path, tiny_models: Any, architecture: str
) -> None:
    torch.manual_seed(0)
    scorer = new_scorer(tiny_models.save(tiny_models.build(architecture), tmp_path) / "model").eval()
    torch.nn.init.normal_(scorer.score.weight)
    pad_id = tiny_models.tokenizer.pad_token_id
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.inference_mode():
            hidden = scorer.base_model(input_ids=torch.tensor([prompt + response])).last_hidden_state
            expected.append(scorer.score(hidden[0, -1]).item())
    rows = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    for batch_size in (1, 3):
        found = score_rows(scorer, rows, pad_id, batch_size)
        assert found == pytest.approx(expected, abs=ROUNDING)
