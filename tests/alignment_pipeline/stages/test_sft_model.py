from pathlib import Path
from typing import Any

import pytest
import torch

from alignment_pipeline.errors import DataError, ModelError
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.models import load_causal_lm, load_tokenizer
from alignment_pipeline.progress import ProgressLog, metric_series
from alignment_pipeline.stages.sft_model import labelled_rows
from alignment_pipeline.tokenization import encode


def test_prompts_have_no_label_and_the_end_token_has_one(smoke: Any, tmp_path: Path) -> None:
    spec = smoke.spec("sft_model", tmp_path)
    tokenizer = load_tokenizer(spec.inputs["base_model"])
    source = read_jsonl(spec.inputs["dataset"] / "train.jsonl")
    rows = labelled_rows(spec, tokenizer, "train")
    assert len(rows) == len(source) > 0
    for made, row in zip(rows, source, strict=True):
        prompt_tokens = sum(label == -100 for label in made["labels"])
        assert made["labels"][:prompt_tokens] == [-100] * prompt_tokens
        assert made["labels"][prompt_tokens:] == made["input_ids"][prompt_tokens:]
        assert tokenizer.decode(made["input_ids"][:prompt_tokens]) == row["prompt"]
        assert tokenizer.decode(made["input_ids"][prompt_tokens:]) == row["reference"] + tokenizer.eos_token
        assert made["labels"][-1] == tokenizer.eos_token_id
        assert made["labels"].count(tokenizer.eos_token_id) == 1
        assert (prompt_tokens, len(made["labels"]) - prompt_tokens) == (row["prompt_tokens"], row["completion_tokens"])


def test_training_lowers_the_loss_on_the_response(smoke: Any, tmp_path: Path) -> None:
    log = ProgressLog(tmp_path / "progress.jsonl")
    result = smoke.run("sft_model", tmp_path / "run", log, method="full", learning_rate=1e-2, max_steps=27)
    losses = [metrics["train/loss"] for _, metrics in metric_series(log.path).items()]
    assert len(losses) == result.metrics["train/steps"] == 27
    assert result.metrics["eval/loss"] < losses[0] - 0.5  # nats a token; it falls by 1.0 here


def test_a_loss_that_is_no_number_stops_the_stage_and_names_the_step(smoke: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"The loss became nan at step \d; nothing was published\. Lower the learning"):
        smoke.run("sft_model", tmp_path, learning_rate=1e30, warmup_fraction=0.0)
    assert list((tmp_path / "output").iterdir()) == []


def test_a_split_without_rows_is_named(smoke: Any, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "dataset" / f"{split}.jsonl", [])
    with pytest.raises(DataError, match="Found no instruction rows to train on, expected at least one"):
        smoke.run("sft_model", tmp_path / "run", inputs={"dataset": tmp_path / "dataset"})


def test_every_held_out_token_counts_alike(smoke: Any) -> None:
    folder, metrics = smoke.artifact("sft_model"), smoke.results["sft_model"].metrics
    model, tokenizer = load_causal_lm(folder / "model"), load_tokenizer(folder)
    losses, likeliest = [], []
    for row in read_jsonl(smoke.artifact("formatted_dataset") / "validation.jsonl"):
        prompt, completion = encode(tokenizer, [row["prompt"], row["completion"]])
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.tensor(completion)
        losses += torch.nn.functional.cross_entropy(logits, wanted, reduction="none").tolist()
        likeliest += (logits.argmax(-1) == wanted).tolist()
    assert metrics["eval/loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)  # merged weights round otherwise
    assert metrics["eval/token_accuracy"] == pytest.approx(sum(likeliest) / len(likeliest), abs=2 / len(likeliest))
