from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from alignment_pipeline.tokenization import encode, encode_prompts, encode_responses, leading_tokens


def putting(tokenizer: PreTrainedTokenizerFast, form: str) -> Any:
    """A tokenizer that puts special tokens around every text, as `form` says, for example `</s> $A`."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="</s>",
    )
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("</s>", "<pad>")]
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=ids)
    return copy


@pytest.mark.parametrize(("form", "before"), [("</s> $A", 1), ("$A", 0), ("$A </s>", 0), ("</s> <pad> $A </s>", 2)])
def test_a_prompt_begins_with_the_tokens_that_its_tokenizer_puts_before_texts(
    tokenizer: PreTrainedTokenizerFast, form: str, before: int
) -> None:
    around = putting(tokenizer, form)
    eos, pad = tokenizer.convert_tokens_to_ids(["</s>", "<pad>"])
    assert leading_tokens(around) == [eos, pad][:before]
    assert encode_prompts(around, ["def f", "x"]) == [
        [*[eos, pad][:before], *ids] for ids in encode(around, ["def f", "x"])
    ]


def test_a_prompt_that_has_the_leading_tokens_already_gets_none_again(tokenizer: PreTrainedTokenizerFast) -> None:
    around = putting(tokenizer, "</s> $A")
    assert encode_prompts(around, ["</s>def f"]) == encode_prompts(around, ["def f"])


def test_a_response_never_begins_with_them(tokenizer: PreTrainedTokenizerFast) -> None:
    around = putting(tokenizer, "</s> $A")
    assert encode_responses(around, ["x"]) == [[*encode(tokenizer, ["x"])[0], around.eos_token_id]]


def test_no_texts_are_no_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_prompts(tokenizer, []) == encode(tokenizer, []) == []
