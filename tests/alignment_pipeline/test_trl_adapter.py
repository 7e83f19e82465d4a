"""The contract with TRL's private API: these tests say what to mend when a new TRL breaks the adapter."""

import dataclasses
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from trl import DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from alignment_pipeline import trl_adapter
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.progress import ProgressLog, metric_series
from alignment_pipeline.sequences import chosen_logprobs, pack, response_logits, response_tokens
from alignment_pipeline.stages.dpo_policy import train_dpo
from alignment_pipeline.trl_adapter import make_head_fast

# Compact and full head multiply matrices of other shapes: float32 rounding, relative to gradients of size up to 1.
ROUNDING = {"rtol": 1e-4, "atol": 1e-6}
PROMPTS = [[7, 12, 250, 33], [91], [18, 5, 77, 42, 9, 130, 131]]
RESPONSES = [[44, 45, 1], [99, 98, 97, 96, 95, 1], [3]]


@pytest.fixture(autouse=True)
def _untouched_trl(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TRL as it is before the adapter, and again after the test."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction, _use_triton

    monkeypatch.setattr(trl.trainer.utils, "_use_triton", _use_triton)
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
    yield


def fused_loss(model: Any, pad_id: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients and number of positions scored by TRL's fused head on a batch with masked prompts."""
    batch = pack(PROMPTS, RESPONSES, pad_id)
    labels = torch.where(batch.response_mask, batch.input_ids, -100)
    add_fused_lm_head(model)
    scored: list[int] = []
    function = trl.trainer.utils._ChunkedLogProbFunction
    original = function.apply
    function.apply = lambda hidden, *rest: (scored.append(hidden.shape[0]), original(hidden, *rest))[1]
    try:
        attention_mask = batch.attention_mask.long()
        loss = model(batch.input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True).loss
    finally:
        function.apply = original
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, scored[0]


@pytest.mark.parametrize("architecture", ["opt", "opt_projected", "gpt2", "llama", "qwen3"])
def test_scoring_labelled_positions_only_gives_the_same_loss_and_gradients_from_fewer_positions(
    tiny_models: Any, architecture: str
) -> None:
    pad_id = tiny_models.tokenizer.pad_token_id
    untouched, untouched_gradients, every_position = fused_loss(tiny_models.build(architecture), pad_id)
    make_head_fast()
    compact, gradients, labelled_positions = fused_loss(tiny_models.build(architecture), pad_id)
    torch.testing.assert_close(compact, untouched, **ROUNDING)
    assert gradients.keys() == untouched_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, untouched_gradients[name], msg=name, **ROUNDING)
    assert labelled_positions == sum(map(len, RESPONSES)) < every_position
    batch = pack(PROMPTS, RESPONSES, pad_id)
    with torch.inference_mode():  # and both are the mean over response tokens that the library computes
        logprobs = chosen_logprobs(response_logits(tiny_models.build(architecture), batch), response_tokens(batch))
    torch.testing.assert_close(compact, -logprobs.mean(), **ROUNDING)


def test_trl_still_has_the_names_that_the_adapter_touches() -> None:
    assert callable(trl.trainer.utils._use_triton)
    head = inspect.getsource(trl.trainer.utils.add_fused_lm_head)
    assert "compact = _use_triton(" in head
    assert "per_token = _ChunkedLogProbFunction.apply(" in head
    theirs = trl.kernels.ChunkedLogProbFunction.forward
    assert [*inspect.signature(theirs).parameters][1:] == [*inspect.signature(trl_adapter._Head.apply).parameters]
    for name in ("_prepare_dataset", "_precompute_ref_logps"):
        assert f"self.{name}(" in inspect.getsource(DPOTrainer), f"DPOTrainer no longer calls {name}"
        assert name in vars(trl_adapter.TokenizedDPOTrainer)


@pytest.mark.parametrize("name", ["_use_triton", "_ChunkedLogProbFunction"])
def test_a_trl_without_a_private_name_is_refused_with_a_reason(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(trl.trainer.utils, name)
    with pytest.raises(ImportError, match=rf"no {name}: this TRL version needs a new adapter"):
        make_head_fast()


def test_the_heads_gradients_are_those_of_cross_entropy_and_its_likeliest_tokens_the_logits() -> None:
    torch.manual_seed(0)
    tokens, width, vocabulary = 600, 8, 50  # more tokens than are computed at once
    hidden, weight = torch.randn(tokens, width), torch.randn(vocabulary, width)
    bias, targets = torch.randn(vocabulary), torch.randint(vocabulary, (tokens,))
    wanted = torch.randn(tokens)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    logprobs, _, _, _, is_top1 = trl_adapter._Head.apply(*leaves, targets, 1.0, 32768, None, 1.0, ("log_probs",))
    (logprobs * wanted).sum().backward()
    plain = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    logits = torch.nn.functional.linear(*plain)
    expected = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (expected * wanted).sum().backward()
    torch.testing.assert_close(logprobs, expected, **ROUNDING)
    assert torch.equal(is_top1, logits.argmax(-1) == targets)
    for leaf, other in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)  # sums of 600 terms of size 1


class TestDpo:
    beta = 0.1
    # The mean of 8 pairs' losses; reference and policy log-probabilities come from other batches, so that a sum of
    # some 60 float32 terms of size 1 to 6 differs by up to 1e-4, times beta.
    rounding = 1e-4

    def first_loss(self, smoke: Any, folder: Path, **inputs: Path) -> float:
        spec = smoke.spec("dpo_policy", folder, inputs=inputs, max_steps=1)
        spec = dataclasses.replace(spec, config=spec.config.model_copy(update={"beta": self.beta}))
        log = ProgressLog(folder / "progress.jsonl")
        train_dpo(spec, log)
        return metric_series(log.path)["train", 1]["train/loss"]

    def test_the_first_loss_is_ln_2_when_the_policy_is_the_reference(self, smoke: Any, tmp_path: Path) -> None:
        assert self.first_loss(smoke, tmp_path) == pytest.approx(math.log(2), abs=self.rounding)

    def test_the_given_reference_log_probabilities_are_the_ones_that_count(self, smoke: Any, tmp_path: Path) -> None:
        given = smoke.artifact("reference_logprobs")
        for split in ("train", "validation"):
            rows = read_jsonl(given / f"{split}.jsonl")
            shifted = [row | {"ref_chosen_logprob": row["ref_chosen_logprob"] + 3} for row in rows]
            write_jsonl(tmp_path / "reference" / f"{split}.jsonl", shifted)
        loss = self.first_loss(smoke, tmp_path / "run", reference_logprobs=tmp_path / "reference")
        # Every implicit reward margin is then -3 beta: -log sigmoid(-0.3).
        assert loss == pytest.approx(math.log(1 + math.exp(3 * self.beta)), abs=self.rounding)
