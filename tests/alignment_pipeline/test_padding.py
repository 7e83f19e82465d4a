"""Fewer padding tokens, the same numbers."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from alignment_pipeline.configs import SftConfig
from alignment_pipeline.errors import ModelError
from alignment_pipeline.models import with_adapter
from alignment_pipeline.padding import (
    order_by_length,
    passes,
    reads_only_backwards,
    require_documents_apart,
    without_padding,
)
from alignment_pipeline.progress import ProgressLog, metric_series
from alignment_pipeline.sequences import causal_lm_of, pack

_DRAW = random.Random(0)
LENGTHS = [_DRAW.randint(2, 200) for _ in range(203)]
# Other shapes of the same matrix products: float32 rounding, of hidden states and gradients of size about 1.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
LONG = {"gpt2": {"n_positions": 1024}, "qwen3": {"max_position_embeddings": 1024}}
TOKENS = [[7, 12, 250, 33, 18, 5, 77], [91, 4], [18, 5, 77, 42, 9, 130, 131, 7, 7, 7, 9, 20], [40, 41, 42]]


def padded(lengths: list[int], steps: list[list[int]]) -> int:
    return sum(len(step) * max(lengths[row] for row in step) for step in steps)


class TestOrder:
    def test_two_passes_have_every_row_twice_and_are_of_another_order(self) -> None:
        order = order_by_length(LENGTHS, 8, 2 * len(LENGTHS), seed=0)
        assert Counter(order) == Counter(2 * list(range(len(LENGTHS))))
        assert order[:200] != order[200:400] and len(set(order[:200])) == 200

    def test_a_share_of_a_pass_is_a_share_of_the_rows(self) -> None:
        assert (
            len(order_by_length(LENGTHS, 8, 100, seed=0)) == len(set(order_by_length(LENGTHS, 8, 100, seed=0))) == 100
        )
        assert len(order_by_length(LENGTHS, 8, 300, seed=0)) == 300

    def test_steps_of_later_passes_hold_similar_rows_too(self) -> None:
        order = order_by_length(LENGTHS, 8, 3 * len(LENGTHS), seed=0)
        steps = [order[start : start + 8] for start in range(0, len(order), 8)]
        assert padded(LENGTHS, steps) < 1.2 * 3 * sum(LENGTHS)

    def test_steps_hold_similar_rows_and_come_in_no_order_of_length(self) -> None:
        order = order_by_length(LENGTHS, 8, len(LENGTHS), seed=0)
        steps = [order[start : start + 8] for start in range(0, 200, 8)]
        shuffled = [list(range(start, start + 8)) for start in range(0, 200, 8)]
        assert padded(LENGTHS, steps) < 1.2 * sum(LENGTHS) < 0.8 * padded(LENGTHS, shuffled)
        longest = [max(LENGTHS[row] for row in step) for step in steps]
        falls = sum(later < earlier for earlier, later in pairwise(longest))
        assert 8 <= falls <= 16  # of 24; within a window alone they would all rise

    def test_the_seed_decides(self) -> None:
        assert order_by_length(LENGTHS, 8, len(LENGTHS), seed=0) == order_by_length(LENGTHS, 8, len(LENGTHS), seed=0)
        assert order_by_length(LENGTHS, 8, len(LENGTHS), seed=0) != order_by_length(LENGTHS, 8, len(LENGTHS), seed=1)

    def test_fewer_rows_than_a_step_are_one_short_step(self) -> None:
        assert sorted(order_by_length([3, 1, 2], 8, 3, seed=0)) == [0, 1, 2]


class TestPasses:
    def test_a_split_by_hand(self) -> None:
        # One pass: 4 × 100 + 10. Two: 2 × 10 + 10, 2 × 100 + 10. Three save nothing more.
        assert passes([100, 10, 99, 10], pass_tokens=10) == [[1, 3], [2, 0]]
        assert passes([100, 10, 99, 10], pass_tokens=1000) == [[1, 3, 2, 0]]

    def test_no_split_into_two_costs_less(self) -> None:
        lengths = LENGTHS[:12]
        found = passes(lengths, pass_tokens=20)
        ranked = sorted(lengths)
        cost = padded(lengths, found) + 20 * len(found)
        assert sorted(row for rows in found for row in rows) == list(range(12))
        assert cost <= min(n * ranked[n - 1] + (12 - n) * ranked[-1] + 40 for n in range(1, 12))


@pytest.mark.parametrize("architecture", ["opt", "opt_projected", "gpt2", "llama"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_hidden_states_and_gradients_of_real_tokens_are_those_of_the_padded_batch(
    tiny_models: Any, monkeypatch: pytest.MonkeyPatch, architecture: str, method: str
) -> None:
    monkeypatch.setattr(passes, "__defaults__", (1,))
    model = with_adapter(tiny_models.build(architecture), SftConfig(method=method), "CAUSAL_LM")
    batch = pack(TOKENS, [[1]] * len(TOKENS), tiny_models.tokenizer.pad_token_id)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), "use_cache": False}

    def states_and_gradients() -> tuple[torch.Tensor, list[torch.Tensor]]:
        hidden = causal_lm_of(model).base_model(**inputs).last_hidden_state[batch.attention_mask]
        model.zero_grad()
        hidden.square().mean().backward()
        return hidden.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = states_and_gradients()
    seen: list[tuple[int, ...]] = []
    trunk = causal_lm_of(model).base_model
    trunk.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    with without_padding(trunk):
        found = states_and_gradients()
    assert sum(rows * columns for rows, columns in seen if columns > 4) < batch.input_ids.numel()
    torch.testing.assert_close(found[0], expected[0], **ROUNDING)
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, wanted, **ROUNDING)
    assert "forward" not in vars(trunk)


def test_an_encoder_keeps_its_mask(tiny_encoder: Any) -> None:
    assert not reads_only_backwards(tiny_encoder)
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    expected = tiny_encoder(**inputs).last_hidden_state[ids != 0]
    with without_padding(tiny_encoder):
        found = tiny_encoder(**inputs).last_hidden_state[ids != 0]
    torch.testing.assert_close(found, expected, **ROUNDING)


@pytest.fixture
def tiny_encoder() -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(
        BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ).eval()


def test_a_batch_padded_on_the_left_is_left_alone(tiny_models: Any) -> None:
    model = tiny_models.build("gpt2")
    ids, mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    expected = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    with without_padding(model.base_model):
        assert torch.equal(model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state, expected)


class TestPacking:
    @pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
    def test_documents_stay_apart_where_positions_are_read(self, tiny_models: Any, architecture: str) -> None:
        require_documents_apart(tiny_models.build(architecture).base_model)

    @pytest.mark.parametrize("architecture", ["opt", "opt_projected"])
    def test_opt_is_refused(self, tiny_models: Any, architecture: str) -> None:
        with pytest.raises(ModelError, match=r"OPTModel reads across documents.*Set sft\.packing=none"):
            require_documents_apart(tiny_models.build(architecture).base_model)

    def test_the_stage_refuses_before_it_trains(self, smoke: Any, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="OPTModel reads across documents"):
            smoke.run("sft_model", tmp_path, packing="packed")

    @pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
    def test_the_loss_of_every_step_is_that_of_the_rows_apart(
        self, smoke: Any, tiny_models: Any, tmp_path: Path, architecture: str
    ) -> None:
        base = tiny_models.save(tiny_models.build(architecture, **LONG[architecture]), tmp_path / "base")
        losses = {}
        for packing in ("none", "packed"):
            log = ProgressLog(tmp_path / f"{packing}.jsonl")
            smoke.run("sft_model", tmp_path / packing, log, inputs={"base_model": base}, packing=packing, max_steps=3)
            losses[packing] = [metrics["train/loss"] for metrics in metric_series(log.path).values()]
        assert losses["packed"] == pytest.approx(losses["none"], abs=1e-4)  # losses of about 6, rounded at each step
