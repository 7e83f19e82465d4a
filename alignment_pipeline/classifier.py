"""Scores of a text classifier for one of its labels, chosen by name.

Belongs here: reading a `reward_classifier` artifact and scoring texts with it. Training and adopting one is in
`stages.reward_classifier`.

A classifier reads text and not the policy's tokens: it has a tokenizer of its own. A label is chosen by its name, since
its number is whatever the classifier's maker chose, and sorted outputs (transformers' pipelines) have another order for
each text.

Shape key: `B` texts of a batch, `L` tokens after right padding, `C` labels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from alignment_pipeline.errors import ModelError
from alignment_pipeline.limits import max_positions
from alignment_pipeline.models import MODEL_FOLDER, load_classifier
from alignment_pipeline.sequences import by_length
from alignment_pipeline.tokenization import TokenIds

SUMMARY = "summary.json"


@dataclass(frozen=True)
class ClassifierScorer:
    """A classifier ready to score: dropout off, in evaluation mode.

    Attributes:
        model: The sequence classifier, an encoder or a decoder.
        tokenizer: Its own tokenizer, which cuts long texts on the left.
        label: Name of the label whose score counts.
        max_tokens: Longest text, special tokens included; of a longer one the end is read, where the response stands.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    max_tokens: int | None

    @classmethod
    def load(cls, artifact: Path, label: str | None = None, device: str = "cpu") -> Self:
        """Read an artifact's classifier; without `label` the one that the artifact's `summary.json` names.

        Raises:
            ModelError: There is no classifier, or it has no such label.
        """
        if label is None:
            label = json.loads((artifact / SUMMARY).read_text(encoding="utf-8"))["label"]
        model = load_classifier(artifact / MODEL_FOLDER, device)
        require_label(model.config.id2label, label, str(artifact / MODEL_FOLDER))
        tokenizer = AutoTokenizer.from_pretrained(artifact / MODEL_FOLDER, local_files_only=True)
        tokenizer.truncation_side = "left"
        limits = (max_positions(artifact), tokenizer.model_max_length)
        known = [limit for limit in limits if limit is not None and limit < 10**9]  # a tokenizer's "none" is 1e30
        return cls(model, tokenizer, label, min(known, default=None))

    def scores(self, texts: Sequence[str], batch_size: int) -> list[float]:
        """The label's raw logit for each text, in order."""
        return self._of_label(self._logits(texts, batch_size))

    def probabilities(self, texts: Sequence[str], batch_size: int) -> list[float]:
        """The label's probability for each text, in order.

        Of a softmax over the labels; of a sigmoid where they do not exclude each other, or there is only one, as a
        reward model has.
        """
        logits = self._logits(texts, batch_size)
        one_by_one = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
        return self._of_label(logits.sigmoid() if one_by_one else logits.softmax(-1))

    def _of_label(self, values: torch.Tensor) -> list[float]:
        (column,) = (number for number, name in self.model.config.id2label.items() if name == self.label)
        column_values: list[float] = values[:, int(column)].tolist()
        return column_values

    @torch.inference_mode()
    def _logits(self, texts: Sequence[str], batch_size: int) -> torch.Tensor:
        """(len(texts), C) in float32 on the CPU."""
        ids = token_ids(self.tokenizer, texts, self.max_tokens)
        logits = torch.zeros(len(ids), self.model.config.num_labels)
        for rows in by_length([len(row) for row in ids], batch_size):
            batch = padded([ids[row] for row in rows], self.tokenizer.pad_token_id, str(self.model.device))
            logits[rows] = self.model(**batch).logits.float().cpu()
        return logits


def require_label(id2label: dict[int, str], label: str, where: str) -> None:
    """Check that exactly one of a classifier's labels has this name.

    Raises:
        ModelError: None or several have; the message lists the labels.
    """
    names = list(id2label.values())
    if names.count(label) != 1:
        raise ModelError(
            f"reward_classifier.label: found {label!r}, but {where} has the labels {', '.join(names)}; expected one of "
            "them, and only one of that name. Set reward_classifier.label to the one that is to be rewarded."
        )


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int | None) -> list[TokenIds]:
    """Token ids of texts with the special tokens that the classifier expects; an empty text has at least one token."""
    if not texts:
        return []
    options: dict[str, Any] = {"truncation": True, "max_length": max_tokens} if max_tokens else {}
    ids: list[TokenIds] = tokenizer(list(texts), **options)["input_ids"]
    eos = tokenizer.eos_token_id
    return [row or [tokenizer.pad_token_id if eos is None else eos] for row in ids]


def padded(ids: Sequence[TokenIds], pad_id: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (B, L), padded on the right.

    There are no `token_type_ids`, whatever the tokenizer makes: BERT's are 0 for a single text anyhow, and GPT-2 would
    add the embedding of token 0 to every token.
    """
    length = max(map(len, ids))
    input_ids = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in ids])
    lengths = torch.tensor([len(row) for row in ids])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


def whole_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[TokenIds], responses: Sequence[TokenIds]
) -> list[str]:
    """What a classifier reads: each prompt with its response, without special tokens.

    Both are decoded together. A decoder may take the leading space off a text, and a character or a word may have
    tokens on both sides of the boundary.
    """
    ids = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    texts: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts
