"""Decoding settings; the oracles are transformers' `generate`, prompt by prompt, and its text-generation pipeline."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, pipeline

from alignment_pipeline.beam_search import beam_search
from alignment_pipeline.decoding import in_words, respond
from alignment_pipeline.decoding_configs import DecodingFields
from alignment_pipeline.errors import DataError
from alignment_pipeline.generation import generate

ARCHITECTURES = ["opt", "opt_projected", "gpt2", "llama"]
PROMPTS = [[7, 12, 250, 33], [91], [18, 5, 77, 42, 9, 130, 131], [60, 61], [60, 61, 60, 61, 60]]
TEXTS = ["### Instruction:", "Add", "def add_one(x: int) -> int:", "return x", "Add one to x.\n"]
CHANGES = [
    {},
    {"repetition_penalty": 1.4},
    {"min_new_tokens": 9},
    {"repetition_penalty": 1.3, "min_new_tokens": 7},
    {"repetition_penalty": 0.8},
]


def model_that_ends(tiny_models: Any, architecture: str) -> Any:
    """Its end token is likely, so that responses end at different lengths unless they may not."""
    model = tiny_models.build(architecture, **({} if architecture == "gpt2" else {"tie_word_embeddings": False}))
    eos, generator = tiny_models.tokenizer.eos_token_id, torch.Generator().manual_seed(4)
    with torch.no_grad():
        head = model.get_output_embeddings().weight
        head[eos] = 1.6 * head.std() * torch.randn(head.shape[1], generator=generator)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tiny_models.tokenizer.pad_token_id)
    return model


def by_transformers(model: Any, prompt: list[int], **settings: Any) -> list[int]:
    ids = torch.tensor([prompt])
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
    eos = model.generation_config.eos_token_id
    return found[: found.index(eos) + 1] if eos in found else found


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_responses_are_those_of_transformers(
    tiny_models: Any, architecture: str, changes: dict[str, Any]
) -> None:
    model = model_that_ends(tiny_models, architecture)
    settings = DecodingFields(temperature=0, max_new_tokens=12, **changes)
    found = respond(model, tiny_models.tokenizer, PROMPTS, settings, batch_size=3, seed=0)
    expected = [by_transformers(model, prompt, do_sample=False, max_new_tokens=12, **changes) for prompt in PROMPTS]
    assert [response.token_ids for response in found] == expected
    assert [response.ended for response in found] == [
        ids[-1] == model.generation_config.eos_token_id for ids in expected
    ]


def test_a_shortest_length_holds_the_end_back_and_a_penalty_changes_what_is_said(tiny_models: Any) -> None:
    """Else the comparison with transformers would be of settings that do nothing."""
    model, tokenizer = model_that_ends(tiny_models, "opt"), tiny_models.tokenizer

    def greedy(**changes: Any) -> list[list[int]]:
        settings = DecodingFields(temperature=0, max_new_tokens=12, **changes)
        found = respond(model, tokenizer, PROMPTS, settings, batch_size=3, seed=0)
        return [response.token_ids for response in found]

    plain = greedy()
    assert min(map(len, plain)) < 9 <= min(map(len, greedy(min_new_tokens=9)))
    assert greedy(repetition_penalty=1.4) != plain


@pytest.mark.parametrize("changes", CHANGES[:4], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_beams_are_those_of_transformers_whatever_the_batch(
    tiny_models: Any, architecture: str, changes: dict[str, Any]
) -> None:
    model = model_that_ends(tiny_models, architecture)
    expected = [
        by_transformers(model, prompt, do_sample=False, num_beams=5, max_new_tokens=10, **changes) for prompt in PROMPTS
    ]
    settings = DecodingFields(temperature=0, num_beams=5, max_new_tokens=10, **changes)
    for batch_size in (1, 64):
        found = respond(model, tiny_models.tokenizer, PROMPTS, settings, batch_size=batch_size, seed=0)
        assert [response.token_ids for response in found] == expected


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama"])
def test_beams_give_the_texts_of_the_text_generation_pipeline(tiny_models: Any, architecture: str) -> None:
    model, tokenizer = model_that_ends(tiny_models, architecture), tiny_models.tokenizer
    prompts = tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    found = beam_search(model, tokenizer, prompts, num_beams=5, max_new_tokens=10, batch_size=64)
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = [
        answer(text, num_beams=5, max_new_tokens=10, do_sample=False, return_full_text=False, add_special_tokens=False)
        for text in TEXTS
    ]
    assert [response.text for response in found] == [each[0]["generated_text"] for each in expected]
    assert len({response.text for response in found}) > 2


def test_a_beam_search_finds_what_is_more_probable_than_the_greedy_response(tiny_models: Any) -> None:
    model, tokenizer = tiny_models.build("opt"), tiny_models.tokenizer

    def logprob(prompt: list[int], response: list[int]) -> float:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return sum(logits[len(prompt) - 1 + step, token].item() for step, token in enumerate(response))

    endless = {"max_new_tokens": 6, "min_new_tokens": 6}  # of one length, so that totals compare
    greedy = generate(model, tokenizer, PROMPTS, temperature=0, batch_size=8, seed=0, **endless)
    beams = beam_search(model, tokenizer, PROMPTS, num_beams=5, batch_size=64, **endless)
    gains = [
        logprob(prompt, beam.token_ids) - logprob(prompt, one.token_ids)
        for prompt, one, beam in zip(PROMPTS, greedy, beams, strict=True)
    ]
    assert min(gains) > -1e-4 and max(gains) > 0.01  # rounding of six float32 terms


DRAWS = 4096


def first_tokens(tiny_models: Any, **settings: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Tokens drawn first after a prompt, and the probabilities of all of them at the temperature."""
    model, settings = tiny_models.build("opt"), {"temperature": 1.0} | settings
    responses = generate(
        model, tiny_models.tokenizer, [PROMPTS[0]] * DRAWS, max_new_tokens=1, batch_size=DRAWS, seed=0, **settings
    )
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    shares = (logits / settings["temperature"]).softmax(-1).numpy()
    return np.array([response.token_ids[0] for response in responses]), shares


def require_drawn_from(drawn: np.ndarray[Any, Any], shares: np.ndarray[Any, Any], kept: np.ndarray[Any, Any]) -> None:
    """All draws are of the kept tokens, each as often as its share among them says."""
    assert set(drawn) <= set(kept)
    expected = shares[kept] / shares[kept].sum()
    found = np.array([(drawn == token).mean() for token in kept])
    spread = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (abs(found - expected) < 5 * spread + 1e-9).all()  # one of 20 tokens is further off with probability 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("top_k", [1, 5, 20])
def test_top_k_draws_from_the_k_most_probable_tokens(tiny_models: Any, top_k: int, temperature: float) -> None:
    drawn, shares = first_tokens(tiny_models, top_k=top_k, temperature=temperature)
    require_drawn_from(drawn, shares, np.argsort(-shares)[:top_k])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("top_p", [0.05, 0.4])
def test_top_p_draws_from_the_fewest_tokens_that_have_the_share_at_the_temperature(
    tiny_models: Any, top_p: float, temperature: float
) -> None:
    drawn, shares = first_tokens(tiny_models, top_p=top_p, temperature=temperature)
    order = np.argsort(-shares)
    kept = order[: int(np.searchsorted(np.cumsum(shares[order]), top_p)) + 1]
    require_drawn_from(drawn, shares, kept)
    assert len(set(drawn)) > len(kept) / 2


def test_top_p_goes_over_what_top_k_has_left(tiny_models: Any) -> None:
    drawn, shares = first_tokens(tiny_models, top_k=4, top_p=0.6)
    order = np.argsort(-shares)[:4]
    kept = order[: int(np.searchsorted(np.cumsum(shares[order] / shares[order].sum()), 0.6)) + 1]
    assert len(kept) < 4
    require_drawn_from(drawn, shares, kept)


def test_a_share_of_everything_cuts_nothing(tiny_models: Any) -> None:
    model, sampling = tiny_models.build("opt"), {"max_new_tokens": 6, "batch_size": 8, "seed": 3, "temperature": 0.7}
    plain = generate(model, tiny_models.tokenizer, PROMPTS, **sampling)
    assert generate(model, tiny_models.tokenizer, PROMPTS, top_p=1.0, **sampling) == plain
    assert generate(model, tiny_models.tokenizer, PROMPTS, top_p=0.1, **sampling) != plain


def test_a_row_is_the_same_in_any_batch_with_every_knob_turned(tiny_models: Any) -> None:
    model = model_that_ends(tiny_models, "llama")
    settings = DecodingFields(
        temperature=0.8, top_k=40, top_p=0.95, repetition_penalty=1.3, min_new_tokens=3, max_new_tokens=8
    )
    expected, *others = (
        respond(model, tiny_models.tokenizer, PROMPTS * 6, settings, batch_size=batch_size, seed=2)
        for batch_size in (1, 7, 64)
    )
    assert others == [expected, expected]
    assert len({tuple(response.token_ids) for response in expected}) > 15
    assert {response.ended for response in expected} == {True, False}


def test_beams_that_the_model_has_no_positions_for_are_refused(tiny_models: Any) -> None:
    with pytest.raises(DataError, match="a prompt of 60 tokens to be followed by up to 5, expected at most 64"):
        beam_search(
            tiny_models.build("gpt2"), tiny_models.tokenizer, [[7] * 60], num_beams=2, max_new_tokens=5, batch_size=8
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0}, "greedy"),
        ({"temperature": 0.7, "top_p": 0.9}, "temperature 0.7, top-p 0.9"),
        ({"top_k": 20, "repetition_penalty": 1.2}, "temperature 1, top-k 20, rep. penalty 1.2"),
        ({"temperature": 0, "num_beams": 5, "min_new_tokens": 16}, "beams 5, min 16 tokens"),
    ],
)
def test_settings_in_words(settings: dict[str, Any], words: str) -> None:
    assert in_words(DecodingFields(**settings)) == words
