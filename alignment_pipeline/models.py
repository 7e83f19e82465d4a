"""Models and tokenizers on disk: loading them safely, attaching adapters, and writing them back.

An artifact that holds a model has `model/` (safetensors, config, tokenizer) or `adapter/` (a LoRA adapter of the
recipe's trunk). Which trunk an adapter belongs to is known from the manifest's inputs, never from a path in the
adapter's config.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignment_pipeline.configs import AdapterFields, Precision
from alignment_pipeline.errors import ModelError

MODEL_FOLDER = "model"
ADAPTER_FOLDER = "adapter"
POLICY_ADAPTER = "default"
"""PEFT's name of the adapter that is trained and saved; others may stand beside it on the same trunk."""

# Every name under which the supported architectures keep a dropout rate. OPT applies dropout as a function of its
# config, so that turning off nn.Dropout modules, as TRL's `disable_dropout` does, is not enough.
_DROPOUT_KEYS = (
    "dropout", "attention_dropout", "activation_dropout", "layerdrop", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "summary_first_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "classifier_dropout", "seq_classif_dropout", "embedding_dropout", "mlp_dropout", "pooler_dropout",
)  # fmt: skip


def load_tokenizer(artifact: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of an artifact's `model/` folder.

    Raises:
        ModelError: There is none, or it has no end token, or its padding token is its end token (then the end of a
            response could not be told from padding, and would never be trained).
    """
    folder = artifact / MODEL_FOLDER
    # transformers makes an empty tokenizer up from config.json where there are no files of one.
    if not any(folder.glob("tokenizer*.json")):
        raise ModelError(f"{folder}: found no tokenizer files, expected tokenizer.json.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: no tokenizer could be read ({error}); expected tokenizer.json.") from error
    if tokenizer.eos_token_id is None or tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise ModelError(
            f"{folder}: found eos {tokenizer.eos_token!r} and pad {tokenizer.pad_token!r}, "
            "expected two different tokens."
        )
    return tokenizer


def load_causal_lm(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """A causal language model from a folder of safetensors, in float32, dropout off, in evaluation mode.

    Raises:
        ModelError: The folder holds no safetensors model, or one whose logits are not its head's output.
    """
    model = _load(AutoModelForCausalLM, folder).to(device).eval()
    _require_plain_head(model, folder)
    return model


def load_policy(policy: Path, trunk: Path, device: str = "cpu") -> PreTrainedModel:
    """A policy ready for inference: its own `model/`, or the trunk's with the policy's adapter merged in."""
    if (policy / MODEL_FOLDER).exists():
        return load_causal_lm(policy / MODEL_FOLDER, device)
    model = load_causal_lm(trunk / MODEL_FOLDER, device)
    adapted = PeftModel.from_pretrained(model, str(policy / ADAPTER_FOLDER), torch_device="cpu")
    return adapted.merge_and_unload().eval()


def load_scorer(artifact: Path, trunk: Path | None, device: str = "cpu") -> PreTrainedModel:
    """A reward model, a classifier with one output: from `model/`, or the trunk with adapter and score head.

    Raises:
        ModelError: There is neither.
    """
    if (artifact / MODEL_FOLDER).exists():
        return new_scorer(artifact / MODEL_FOLDER).to(device).eval()
    if trunk is None:
        raise ModelError(f"{artifact}: found no {MODEL_FOLDER}/, expected one, or the trunk that the adapter is for.")
    scorer = new_scorer(trunk / MODEL_FOLDER).to(device)
    adapted = PeftModel.from_pretrained(scorer, str(artifact / ADAPTER_FOLDER), torch_device="cpu")
    return adapted.merge_and_unload().eval()


def load_classifier(folder: Path, device: str = "cpu") -> PreTrainedModel:
    """A text classifier with its own labels, dropout off, in evaluation mode.

    Raises:
        ModelError: The folder holds no safetensors model.
    """
    model = _load(AutoModelForSequenceClassification, folder)
    return model.to(device).eval()


def new_scorer(folder: Path) -> PreTrainedModel:
    """The trunk as a sequence classifier with one output; its `score` head is new where the folder has none."""
    return _load(AutoModelForSequenceClassification, folder, num_labels=1)


def with_adapter(model: PreTrainedModel, config: AdapterFields, task_type: str) -> Any:
    """The model with a fresh LoRA adapter, or unchanged where the configuration trains all weights."""
    if config.method == "full":
        return model
    heads = head_names(model) if task_type == "SEQ_CLS" else ()
    try:
        return get_peft_model(model, lora_config(config, task_type, heads))
    except ValueError as error:
        raise ModelError(
            f"lora_targets: found {config.lora_targets!r}, expected names of linear modules of this model, "
            f"or all-linear ({str(error).splitlines()[0]})."
        ) from error


def autocast(precision: Precision, device: str) -> torch.autocast:
    """Within, matrix products are in bfloat16 where the precision says so; weights stay what they are."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def head_names(model: PreTrainedModel) -> tuple[str, ...]:
    """What stands on a classifier's body: `score` on a decoder, on an encoder `classifier`, alone or after others."""
    return tuple(
        name
        for name, module in model.named_children()
        if module is not model.base_model and any(True for _ in module.parameters())
    )


def lora_config(config: AdapterFields, task_type: str, heads: Sequence[str] = ()) -> LoraConfig:
    """PEFT's configuration of the recipe's adapter keys; `heads` are trained whole, and PEFT gives them no adapter."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets,
        task_type=task_type,
        modules_to_save=list(heads) or None,
    )


def add_reward_adapter(model: PeftModel, artifact: Path, name: str) -> torch.nn.Linear:
    """Put a reward model's adapter on the trunk it was trained on, beside the policy's, frozen and not active.

    Args:
        model: A causal language model with the policy's adapter.
        artifact: A reward model's artifact with `adapter/`.
        name: Name of the adapter on the model.

    Returns:
        The reward model's score head, to be put on the last token's hidden state.
    """
    folder = artifact / ADAPTER_FOLDER
    config = LoraConfig.from_pretrained(str(folder))
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, True
    state = load_file(folder / "adapter_model.safetensors")
    head = {key.rpartition(".")[2]: tensor for key, tensor in state.items() if key.split(".")[-2] == "score"}
    model.add_adapter(name, config)
    adapter = {key: tensor for key, tensor in state.items() if key.split(".")[-2] != "score"}
    missing = set_peft_model_state_dict(model, adapter, adapter_name=name).missing_keys
    if any(f".{name}." in key for key in missing) or "weight" not in head:
        raise ModelError(f"{folder}: found {len(adapter)} adapter tensors that do not fit this trunk, expected all to.")
    model.set_adapter(POLICY_ADAPTER)
    score = torch.nn.Linear(head["weight"].shape[1], 1, bias="bias" in head)
    score.load_state_dict(head)
    return score.to(model.device).requires_grad_(False)


def save_trained(model: Any, tokenizer: PreTrainedTokenizerBase, output_dir: Path, *, merge: bool = False) -> None:
    """Write a trained model: an adapter to `adapter/`; all weights (or, with `merge`, the merged trunk) to `model/`.

    Raises:
        ModelError: A weight is not finite; nothing is written.
    """
    require_finite(model)
    if isinstance(model, PeftModel):
        adapter = model.peft_config[POLICY_ADAPTER]
        # Parents are found through the manifest. None would not do: PEFT then writes the trunk's path.
        adapter.base_model_name_or_path = ""
        if isinstance(adapter.target_modules, set):  # its order is another one in each process
            adapter.target_modules = sorted(adapter.target_modules)
        model.save_pretrained(output_dir / ADAPTER_FOLDER, selected_adapters=[POLICY_ADAPTER])
        (output_dir / ADAPTER_FOLDER / "README.md").unlink(missing_ok=True)  # a card without content
        if not merge:
            return
        model = model.merge_and_unload()
    save_model(model, tokenizer, output_dir)


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, output_dir: Path) -> None:
    """Write all weights as safetensors, with the tokenizer, to `model/`."""
    require_finite(model)
    model.save_pretrained(output_dir / MODEL_FOLDER)
    tokenizer.save_pretrained(output_dir / MODEL_FOLDER)


def merged(model: Any) -> Any:
    """The model with its adapter merged into its weights, in place; as it is where it has none."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def weights_sha256(model: Any) -> str:
    """Hash of all weights by name, type, shape and bytes."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def require_finite(model: Any) -> None:
    """Refuse a model with a NaN or an infinity in it.

    Raises:
        ModelError: Names the first such tensor.
    """
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"{name} holds a NaN or an infinity after training; nothing was published. "
                "Lower the learning rate, or look for a broken row in the last batches of the progress log."
            )


def turn_dropout_off(model: PreTrainedModel) -> None:
    """Set every dropout rate of a model to 0, in its configuration too, so that it stays off."""
    for key in _DROPOUT_KEYS:
        if isinstance(getattr(model.config, key, None), float | int):
            setattr(model.config, key, 0.0)
    for module in model.modules():
        for key in ("dropout", "attention_dropout", "layerdrop", "activation_dropout"):
            if isinstance(getattr(module, key, None), float):
                setattr(module, key, 0.0)  # OPT's layers keep their own copy of the rate
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@torch.inference_mode()
def _require_plain_head(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a model that scales or caps its logits: here the head is applied alone, to the positions that count."""
    token_ids = torch.arange(min(4, model.config.vocab_size), device=model.device)[None]
    hidden = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
    expected = model(input_ids=token_ids, use_cache=False).logits.float()
    found = model.get_output_embeddings()(hidden).float()
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ModelError(
            f"{folder}: found a {type(model).__name__}, whose logits are more than its language-model head's output "
            "(scaled or capped), expected a plain head. Use another architecture."
        )


def _load(model_class: Any, folder: Path, **options: Any) -> PreTrainedModel:
    # The folder is checked first: transformers' own message for a missing one speaks of the hub.
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{os.fspath(folder)}: found no .safetensors file, expected a model's weights.")
    model = model_class.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, **options
    )
    if model.can_generate():
        # A hub model brings decoding habits (repetition penalty, top-p) that would fill what a sampler leaves unset.
        tokens = {name: getattr(model.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**tokens)
    turn_dropout_off(model)
    if getattr(model.config, "pad_token_id", None) is None and "num_labels" in options:
        raise ModelError(
            f"{folder}: config.json has no pad_token_id, expected one: a scorer reads the last real token."
        )
    return model
