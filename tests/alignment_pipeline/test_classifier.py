import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from alignment_pipeline.classifier import ClassifierScorer, padded, token_ids, whole_texts
from alignment_pipeline.errors import ModelError
from alignment_pipeline.tokenization import encode

ROUNDING = 1e-5  # logits of size 1 in float32, computed in batches of another shape
LABELS = {0: "NEUTRAL", 1: "POSITIVE", 2: "NEGATIVE"}
TEXTS = ["def add_one(x: int) -> int:", "x", "return x + 1\n" * 5, "", "Add one to x.\n", "return"]


def build(architecture: str, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PreTrainedModel:
    """A random classifier of two layers with three labels, its dropout on wherever the model is not evaluated."""
    common = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "id2label": LABELS,
              "label2id": {name: number for number, name in LABELS.items()}, "initializer_range": 0.4}  # fmt: skip
    torch.manual_seed(0)
    if architecture == "gpt2":
        gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24}
        return GPT2ForSequenceClassification(GPT2Config(**(common | gpt2 | changes)))
    if architecture == "bert":
        bert = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                "max_position_embeddings": 24}  # fmt: skip
        return BertForSequenceClassification(BertConfig(**(common | bert | changes)))
    distilbert = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 24}
    return DistilBertForSequenceClassification(DistilBertConfig(**(common | distilbert | changes)))


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, artifact: Path, label: str = "POSITIVE") -> Path:
    model.save_pretrained(artifact / "model")
    tokenizer.save_pretrained(artifact / "model")
    (artifact / "summary.json").write_text(json.dumps({"label": label}))
    return artifact


def logits_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Of one text by itself, without any padding."""
    with torch.inference_mode():
        return model.eval()(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long()).logits[0]


@pytest.mark.parametrize("architecture", ["distilbert", "bert", "gpt2"])
def test_scores_are_the_labels_logits_and_probabilities_its_share_whatever_the_batch(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, architecture: str
) -> None:
    model = build(architecture, tokenizer)
    artifact = write(model, tokenizer, tmp_path)
    limit = 24
    ids = [(encode(tokenizer, [text])[0] or [tokenizer.eos_token_id])[-limit:] for text in TEXTS]
    assert len({len(row) for row in ids}) > 3 and max(map(len, ids)) == limit
    expected = torch.stack([logits_of(model, row) for row in ids])
    for number, label in LABELS.items():
        scorer = ClassifierScorer.load(artifact, label)
        for batch_size in (1, 4, 100):
            scores = scorer.scores(TEXTS, batch_size)
            assert scores == pytest.approx(expected[:, number].tolist(), abs=ROUNDING)
            shares = expected.softmax(-1)[:, number].tolist()
            assert scorer.probabilities(TEXTS, batch_size) == pytest.approx(shares, abs=ROUNDING)
    assert expected.std() > 0.05


def test_the_label_is_chosen_by_its_name_and_by_default_is_the_artifacts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    artifact = write(build("distilbert", tokenizer), tokenizer, tmp_path, label="NEGATIVE")
    by_name = {label: ClassifierScorer.load(artifact, label).scores(TEXTS, 8) for label in LABELS.values()}
    assert ClassifierScorer.load(artifact).scores(TEXTS, 8) == by_name["NEGATIVE"] != by_name["POSITIVE"]


@pytest.mark.parametrize("label", ["positive", "LABEL_1", "1", ""])
def test_an_unknown_label_is_an_error_that_lists_those_there_are(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, label: str
) -> None:
    artifact = write(build("distilbert", tokenizer), tokenizer, tmp_path)
    with pytest.raises(ModelError, match=rf"found '{label}'.*has the labels NEUTRAL, POSITIVE, NEGATIVE"):
        ClassifierScorer.load(artifact, label)


def test_a_label_that_two_outputs_share_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("distilbert", tokenizer, id2label={0: "A", 1: "A"}, label2id={"A": 0})
    with pytest.raises(ModelError, match="expected one of them, and only one of that name"):
        ClassifierScorer.load(write(model, tokenizer, tmp_path, "A"))


@pytest.mark.parametrize("architecture", ["distilbert", "gpt2"])
def test_a_separate_reward_model_is_a_classifier_with_one_label(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, architecture: str
) -> None:
    model = build(architecture, tokenizer, id2label={0: "LABEL_0"}, label2id={"LABEL_0": 0})
    scorer = ClassifierScorer.load(write(model, tokenizer, tmp_path, "LABEL_0"))
    logits = torch.tensor(scorer.scores(TEXTS, 2))
    assert logits.std() > 0
    torch.testing.assert_close(torch.tensor(scorer.probabilities(TEXTS, 2)), logits.sigmoid(), rtol=0, atol=1e-6)


def test_of_a_long_text_the_end_is_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    scorer = ClassifierScorer.load(write(build("distilbert", tokenizer), tokenizer, tmp_path))
    assert scorer.max_tokens == 24
    end = "".join(random.Random(0).choices("abcdefgh", k=100))
    long, longer, other = scorer.scores(["start " + end, "another start " + end, end + " other"], 2)
    assert long == pytest.approx(longer, abs=ROUNDING)
    assert abs(long - other) > 100 * ROUNDING


def test_scoring_is_without_dropout_and_says_the_same_twice(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build("distilbert", tokenizer, dropout=0.9, attention_dropout=0.9, seq_classif_dropout=0.9)
    scorer = ClassifierScorer.load(write(model, tokenizer, tmp_path))
    assert not scorer.model.training
    assert scorer.scores(TEXTS, 4) == scorer.scores(TEXTS, 4)


def test_labels_that_do_not_exclude_each_other_have_a_probability_each(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build("distilbert", tokenizer, problem_type="multi_label_classification")
    scorer = ClassifierScorer.load(write(model, tokenizer, tmp_path))
    expected = torch.tensor(scorer.scores(TEXTS, 4)).sigmoid().tolist()
    assert scorer.probabilities(TEXTS, 4) == pytest.approx(expected, abs=ROUNDING)


def test_no_texts_have_no_scores(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    scorer = ClassifierScorer.load(write(build("distilbert", tokenizer), tokenizer, tmp_path))
    assert scorer.scores([], 4) == scorer.probabilities([], 4) == []


def test_a_batch_is_padded_on_the_right_and_its_mask_is_true_where_the_token_counts() -> None:
    batch = padded([[5, 6, 7], [8]], pad_id=0)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


def test_an_empty_text_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert token_ids(tokenizer, ["", "x"], 8) == [[tokenizer.eos_token_id], encode(tokenizer, ["x"])[0]]
    assert token_ids(tokenizer, [], 8) == []


def test_prompt_and_response_are_decoded_together(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, ["return é"])[0]
    assert whole_texts(tokenizer, [ids[:-1]], [[ids[-1], tokenizer.eos_token_id]]) == ["return é"]
    assert tokenizer.decode(ids[-1:]) != "é"  # half a character


def test_a_decoder_that_strips_spaces_keeps_the_one_between_prompt_and_response() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "▁good": 1, "▁film": 2}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    stripping = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert stripping.decode([1]) + stripping.decode([2]) == "goodfilm"
    assert whole_texts(stripping, [[1]], [[2]]) == ["good film"]
