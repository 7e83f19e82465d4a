import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GraniteConfig, GraniteForCausalLM

from alignment_pipeline.configs import SftConfig
from alignment_pipeline.errors import ModelError
from alignment_pipeline.generation import generate
from alignment_pipeline.models import (
    load_causal_lm,
    load_policy,
    load_scorer,
    load_tokenizer,
    new_scorer,
    require_finite,
    save_model,
    save_trained,
    with_adapter,
)

# Merging computes W + s·BA once where the adapter computes Wx + s·BAx: float32 rounding of logits of size 1 to 10.
MERGED = {"rtol": 1e-4, "atol": 1e-4}

IDS = torch.tensor([[5, 9, 30, 7, 44, 8]])


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def trunk(tmp_path: Path, tiny_models: Any) -> Path:
    return tiny_models.save(tiny_models.build("opt"), tmp_path / "trunk")


def perturbed_adapter(trunk: Path, task_type: str = "CAUSAL_LM", **config: Any) -> Any:
    """The trunk with an adapter whose weights are as if trained: none is zero."""
    torch.manual_seed(1)
    model = load_causal_lm(trunk / "model") if task_type == "CAUSAL_LM" else new_scorer(trunk / "model")
    model = with_adapter(model, SftConfig(lora_rank=2, **config), task_type)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model.eval()


def test_a_saved_model_is_loaded_as_it_was(trunk: Path, tmp_path: Path, tiny_models: Any) -> None:
    model = load_causal_lm(trunk / "model")
    assert torch.equal(logits_of(model), logits_of(tiny_models.build("opt")))
    assert not model.training
    save_model(model, load_tokenizer(trunk), tmp_path / "copy")
    assert torch.equal(logits_of(load_causal_lm(tmp_path / "copy" / "model")), logits_of(model))
    assert load_tokenizer(tmp_path / "copy").get_vocab() == tiny_models.tokenizer.get_vocab()


@pytest.mark.parametrize(
    "settings",
    [{"pad_token": None}, {"pad_token": "</s>"}, {"eos_token": None}],
    ids=["no pad", "pad is eos", "no eos"],
)
def test_a_tokenizer_whose_end_cannot_be_told_from_padding_is_refused(trunk: Path, settings: dict[str, Any]) -> None:
    edit_json(trunk / "model" / "tokenizer_config.json", **settings)
    with pytest.raises(ModelError, match=r"trunk/model: found eos .* and pad .*, expected two different tokens"):
        load_tokenizer(trunk)


def test_a_missing_tokenizer_is_named(trunk: Path) -> None:
    for path in (trunk / "model").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"trunk/model: found no tokenizer files, expected tokenizer\.json"):
        load_tokenizer(trunk)


def test_a_broken_tokenizer_is_named(trunk: Path) -> None:
    (trunk / "model" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"trunk/model: "):
        load_tokenizer(trunk)


def test_a_folder_without_safetensors_is_refused_and_a_pickle_never_read(trunk: Path) -> None:
    (trunk / "model" / "model.safetensors").unlink()
    (trunk / "model" / "pytorch_model.bin").write_bytes(b"a pickle that must not be opened")
    for load in (load_causal_lm, new_scorer):
        with pytest.raises(ModelError, match=r"found no \.safetensors file, expected a model's weights"):
            load(trunk / "model")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named_and_not_written(
    trunk: Path, tmp_path: Path, tiny_models: Any, value: float
) -> None:
    model = load_causal_lm(trunk / "model")
    require_finite(model)
    model.model.decoder.layers[1].fc2.bias.data[3] = value
    for save in (save_model, save_trained):
        with pytest.raises(ModelError, match=r"decoder\.layers\.1\.fc2\.bias holds a NaN or an infinity"):
            save(model, tiny_models.tokenizer, tmp_path / "output")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("architecture", "rates"),
    [
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
    ],
)
def test_dropout_is_off_even_in_training_mode(
    tmp_path: Path, tiny_models: Any, architecture: str, rates: dict[str, float]
) -> None:
    artifact = tiny_models.save(tiny_models.build(architecture, **rates), tmp_path / "artifact")
    with_dropout = type(tiny_models.build(architecture)).from_pretrained(artifact / "model").train()
    assert not torch.equal(logits_of(with_dropout), logits_of(with_dropout))  # the config does switch it on
    for load in (load_causal_lm, new_scorer):
        model = load(artifact / "model").train()
        assert torch.equal(logits_of(model), logits_of(model))
        assert torch.equal(logits_of(model), logits_of(model.eval()))
        assert {getattr(model.config, name) for name in rates} == {0.0}


def test_dropout_of_the_adapter_stays_as_configured(trunk: Path) -> None:
    model = perturbed_adapter(trunk, lora_dropout=0.5).train()
    assert not torch.equal(logits_of(model), logits_of(model))


def test_a_fresh_adapter_changes_nothing_and_trains_only_itself(trunk: Path) -> None:
    model = with_adapter(load_causal_lm(trunk / "model"), SftConfig(lora_rank=2), "CAUSAL_LM")
    assert torch.equal(logits_of(model.eval()), logits_of(load_causal_lm(trunk / "model")))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_full_training_leaves_the_model_itself(trunk: Path) -> None:
    model = load_causal_lm(trunk / "model")
    assert with_adapter(model, SftConfig(method="full"), "CAUSAL_LM") is model


@pytest.mark.parametrize("architecture", ["opt", "opt_projected", "gpt2", "llama"])
def test_a_policy_read_from_its_adapter_has_the_trained_models_logits(
    tmp_path: Path, tiny_models: Any, architecture: str
) -> None:
    trunk = tiny_models.save(tiny_models.build(architecture), tmp_path / "trunk")
    trained = perturbed_adapter(trunk)
    save_trained(trained, tiny_models.tokenizer, tmp_path / "policy")
    policy = load_policy(tmp_path / "policy", trunk)
    assert not isinstance(policy, PeftModel)
    torch.testing.assert_close(logits_of(policy), logits_of(trained), **MERGED)
    assert (logits_of(policy) - logits_of(load_causal_lm(trunk / "model"))).abs().max() > 0.1


def test_an_adapter_names_no_base_and_holds_no_pickle(trunk: Path, tmp_path: Path, tiny_models: Any) -> None:
    save_trained(perturbed_adapter(trunk), tiny_models.tokenizer, tmp_path / "policy")
    folder = tmp_path / "policy" / "adapter"
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["base_model_name_or_path"]
    assert str(trunk) not in json.dumps(config)


def test_a_merged_model_is_a_trunk_of_its_own_with_its_adapter_beside_it(
    trunk: Path, tmp_path: Path, tiny_models: Any
) -> None:
    trained = perturbed_adapter(trunk)
    expected = logits_of(trained)
    save_trained(trained, tiny_models.tokenizer, tmp_path / "sft", merge=True)
    from_adapter = tmp_path / "adapter only"
    shutil.copytree(tmp_path / "sft" / "adapter", from_adapter / "adapter")
    for policy in (load_policy(tmp_path / "sft", tmp_path / "nowhere"), load_policy(from_adapter, trunk)):
        torch.testing.assert_close(logits_of(policy), expected, **MERGED)


def test_a_scorer_is_read_from_its_adapter_with_its_head(trunk: Path, tmp_path: Path, tiny_models: Any) -> None:
    trained = perturbed_adapter(trunk, "SEQ_CLS")
    save_trained(trained, tiny_models.tokenizer, tmp_path / "reward")
    scorer = load_scorer(tmp_path / "reward", trunk)
    assert logits_of(scorer).shape == (1, 1)
    torch.testing.assert_close(logits_of(scorer), logits_of(trained), **MERGED)


def test_a_fully_trained_scorer_is_read_from_its_own_weights(trunk: Path, tmp_path: Path, tiny_models: Any) -> None:
    scorer = new_scorer(trunk / "model").eval()
    scorer.score.weight.data.normal_()
    save_trained(scorer, tiny_models.tokenizer, tmp_path / "reward")
    assert torch.equal(logits_of(load_scorer(tmp_path / "reward", tmp_path / "nowhere")), logits_of(scorer))


def test_a_scorer_without_a_padding_token_is_refused(trunk: Path) -> None:
    edit_json(trunk / "model" / "config.json", pad_token_id=None)
    with pytest.raises(ModelError, match=r"config\.json has no pad_token_id, expected one"):
        new_scorer(trunk / "model")


@pytest.mark.parametrize("habit", [{"repetition_penalty": 50.0}, {"bad_words_ids": [[40]]}, {"min_new_tokens": 8}])
def test_decoding_habits_that_ship_with_a_model_do_not_shape_what_is_sampled(
    trunk: Path, tiny_models: Any, habit: dict[str, Any]
) -> None:
    def sample() -> list[list[int]]:
        settings = {"max_new_tokens": 8, "temperature": 1.5, "batch_size": 256, "seed": 0}
        model = load_policy(trunk, trunk)
        return [r.token_ids for r in generate(model, tiny_models.tokenizer, [[5, 9, 30, 40]] * 256, **settings)]

    plain = sample()
    assert any(40 in ids for ids in plain) and any(len(ids) < 8 for ids in plain)
    edit_json(trunk / "model" / "generation_config.json", **habit)
    assert sample() == plain


def test_a_model_that_scales_its_logits_is_refused(tmp_path: Path, tiny_models: Any) -> None:
    settings = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
    for scaling in (1.0, 8.0):
        torch.manual_seed(0)
        model = GraniteForCausalLM(GraniteConfig(**settings, logits_scaling=scaling))
        folder = tiny_models.save(model, tmp_path / str(scaling)) / "model"
        if scaling == 1.0:
            load_causal_lm(folder)
        else:
            with pytest.raises(ModelError, match="a GraniteForCausalLM, whose logits are more than its language-model"):
                load_causal_lm(folder)
