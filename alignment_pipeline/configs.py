"""Configuration of each stage: flat, frozen, every key with its meaning, unit and the source of its default.

Belongs here: what a person can set. How sections combine into a recipe is in `recipe`; the Dagster launchpad's forms
are derived from these fields. Resolved values are part of an artifact's key, except fields marked `UNKEYED`, which
cannot change a result.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

UNKEYED: dict[str, Any] = {"keyed": False}
"""Marks a field that does not change the result, or counts by the content it points to."""

_COLUMNS = {
    "instructions": ("instruction", "input", "output"),
    "preferences": ("prompt", "chosen", "rejected"),
    "conversations": ("messages", "prompt", "completion"),
}
"""Form of the records → the columns that a record of it can have."""

_NEEDED_COLUMNS = frozenset({"instruction", "output", "chosen", "rejected"})

Precision = Literal["float32", "bfloat16"]
_PRECISION: Any = Field(
    "float32",
    description="Numbers of the forward and backward passes. bfloat16 is for GPUs, twice as fast or more; weights, "
    "optimizer and sums of log-probabilities stay in float32.",
)

JudgeName = Literal["gold_rule", "reference_chrf", "reward_classifier"]
TemplateName = Literal["instruction", "human_assistant", "chat"]
PolicyName = Literal["base_model", "sft_model", "ppo_policy", "dpo_policy"]


class StageConfig(BaseModel):
    """Base of all sections: unknown keys are errors and values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any) -> Any:
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool):  # Python counts True as 1, and YAML reads yes as True
                raise ValueError(f"found {item} (a boolean), expected a number, text or a list")
        return value

    @model_validator(mode="before")
    @classmethod
    def _part_revision_from_name(cls, values: Any) -> Any:
        """`hub_name: owner/name@revision` is both in one, so that another name does not keep the revision."""
        name = values.get("hub_name") if isinstance(values, dict) else None
        if not isinstance(name, str) or "@" not in name:
            return values
        if values.get("hub_revision"):
            raise ValueError(f"hub_name: found {name} beside hub_revision, expected the revision in one of them")
        owner_and_name, _, revision = name.partition("@")
        if not owner_and_name or not revision:
            raise ValueError(f"hub_name: found {name}, expected owner/name or owner/name@revision")
        return {**values, "hub_name": owner_and_name, "hub_revision": revision}

    def keyed_values(self) -> dict[str, Any]:
        """The values that take part in the artifact key."""
        unkeyed = {
            name for name, field in type(self).model_fields.items() if (field.json_schema_extra or {}) == UNKEYED
        }
        return self.model_dump(mode="json", exclude=unkeyed)

    def input_files(self) -> dict[str, Path]:
        """Files (or a model's folder) that the stage reads beside its inputs; they count by content."""
        path = getattr(self, "path", None)
        return {"source": Path(path)} if path else {}


class DataConfig(StageConfig):
    """Where rows come from, what form they have (`record_forms`), and how they are split by prompt."""

    world_rows: int | None = Field(
        None, ge=20, description="Rows to generate from the built-in world of small Python tasks; no file is read."
    )
    path: str | None = Field(
        None,
        description="JSON, JSONL, CSV or Parquet file (.gz too) of records in the form that data.form says; wins over "
        "hub_name. Relative to the recipe's folder, or to the current folder when set on the command line.",
        json_schema_extra=UNKEYED,
    )
    hub_name: str | None = Field(
        None,
        description="Dataset on the Hugging Face hub, owner/name or owner/name@revision. All files of the repository "
        "are fetched, or with hub_data_dir those of that folder.",
    )
    hub_revision: str | None = Field(None, description="Commit or tag of the hub dataset; null takes its main branch.")
    hub_split: str = Field("train", description="Split of the hub dataset that is read.")
    hub_config: str | None = Field(
        None, min_length=1, description="Configuration of the hub dataset, where it has several; null: its default."
    )
    hub_data_dir: str | None = Field(
        None, min_length=1, description="Folder of the hub dataset, such as helpful-base of Anthropic/hh-rlhf."
    )
    form: Literal["instructions", "preferences", "conversations"] = Field(
        "instructions",
        description="What a record holds. instructions: instruction, output and at times input. preferences: prompt, "
        "chosen and rejected, as texts, dialogues or messages. conversations: messages, or prompt and completion.",
    )
    columns: dict[str, str | None] | None = Field(
        None,
        min_length=1,
        description="Our name of a column → its name in the data, such as {instruction: prompt, output: completion, "
        "input: null}; null leaves it out. Columns that are not named have our names.",
    )
    sql: str | None = Field(
        None,
        min_length=1,
        description="A DuckDB SELECT whose result is read in place of the data, its table source: "
        "SELECT * FROM source WHERE input = ''. It sees no other file, and must not depend on the clock.",
    )
    text_field: str | None = Field(
        None,
        min_length=1,
        description="Field that holds plain text; rows are then texts, without instruction and output.",
    )
    min_chars: int = Field(0, ge=0, description="Rows whose texts together are shorter go to quarantine.")
    max_chars: int = Field(
        8000, ge=10, description="Rows whose prompt and responses together are longer go to quarantine."
    )
    validation_fraction: float = Field(0.05, gt=0, lt=0.5, description="Share of prompts held out while training.")
    test_fraction: float = Field(0.05, gt=0, lt=0.5, description="Share of prompts used by evaluations only.")
    license: str | None = Field(
        None,
        min_length=1,
        description="Licence of the data, an identifier such as cc-by-nc-4.0, for model cards; null: not stated.",
        json_schema_extra=UNKEYED,
    )

    @model_validator(mode="after")
    def _form_can_be_read(self) -> Self:
        if self.world_rows and (self.form != "instructions" or self.columns or self.sql):
            raise ValueError(
                "found form, columns or sql beside world_rows, whose rows are made; expected path or hub_name"
            )
        if self.text_field and (self.form != "instructions" or self.columns):
            raise ValueError("found text_field beside form or columns, expected text_field alone for plain texts")
        known = _COLUMNS[self.form]
        for ours, theirs in (self.columns or {}).items():
            if ours not in known:
                expected = ", ".join(known)
                raise ValueError(f"columns: found {ours!r}, expected one of {expected}, the columns of {self.form}")
            if theirs is None and ours in _NEEDED_COLUMNS:
                raise ValueError(f"columns.{ours}: found null, but {self.form} need it; expected the name of a column")
        return self

    def keyed_values(self) -> dict[str, Any]:
        """As for every stage; a hub name that a file wins over is left out."""
        values = super().keyed_values()
        return {name: value for name, value in values.items() if not (self.path and name.startswith("hub_"))}


class BaseModelConfig(StageConfig):
    """The base model: built small from the training text, read from a folder, or from the hub."""

    path: str | None = Field(
        None, description="Folder of a causal language model (safetensors) and tokenizer.", json_schema_extra=UNKEYED
    )
    hub_name: str | None = Field(None, description="Model on the Hugging Face hub, owner/name or owner/name@revision.")
    hub_revision: str | None = Field(None, description="Commit or tag of the hub model; null takes its main branch.")
    vocab_size: int = Field(1024, ge=300, description="Tokens of the built byte-level BPE tokenizer, special included.")
    hidden_size: int = Field(128, ge=8, description="Width of the built OPT model; a multiple of num_heads.")
    num_layers: int = Field(4, ge=1, description="Layers of the built OPT model.")
    num_heads: int = Field(4, ge=1, description="Attention heads a layer of the built OPT model.")
    max_positions: int = Field(256, ge=32, description="Longest sequence of the built model, tokens.")
    pretrain_steps: int = Field(300, ge=1, description="Optimizer steps of pretraining on unpaired training text.")
    pretrain_batch_size: int = Field(32, ge=1, description="Blocks a pretraining step.")
    pretrain_block_tokens: int = Field(64, ge=8, description="Tokens a pretraining block.")
    pretrain_learning_rate: float = Field(3e-3, gt=0, description="Peak learning rate of pretraining, AdamW.")
    document_copies: int = Field(
        2,
        ge=1,
        le=4,
        description="Times each pretraining document stands in a row; with 2 a small model soon learns to copy.",
    )
    license: str | None = Field(
        None,
        min_length=1,
        description="Licence of a given model, an identifier such as apache-2.0, for model cards; null: not stated.",
        json_schema_extra=UNKEYED,
    )

    def keyed_values(self) -> dict[str, Any]:
        """As for every stage; a given model leaves out what only a built one uses."""
        values = super().keyed_values()
        given = {name: value for name, value in values.items() if name.startswith("hub_")}
        return given if self.path or self.hub_name else values


class FormattingConfig(StageConfig):
    """Prompts and length limits: instructions go into the template, of a plain text the beginning is the prompt."""

    template: TemplateName = Field(
        "instruction",
        description="instruction: a header, the instruction, its input and '### Response:'. human_assistant: a "
        "dialogue of Human and Assistant, as HH-RLHF's. chat: the chat template of the base model's tokenizer.",
    )
    max_prompt_tokens: int = Field(256, ge=4, description="Rows with longer prompts are dropped and counted.")
    max_tokens: int = Field(
        512,
        ge=8,
        description="Rows with a longer prompt + response (the longer one, of a preference) are dropped and counted.",
    )
    prefix_tokens_min: int = Field(2, ge=1, description="Plain texts only: shortest prompt, tokens of the text.")
    prefix_tokens_max: int = Field(
        8, ge=1, description="Plain texts only: longest prompt, tokens; lengths are uniform, both bounds included."
    )


class AdapterFields(StageConfig):
    """How weights are trained: LoRA adapters, or all of them."""

    method: Literal["lora", "full"] = Field("lora", description="lora trains adapters; full trains every weight.")
    lora_rank: int = Field(16, ge=1, description="Rank of the LoRA update (arXiv 2106.09685).")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale: the update is multiplied by alpha / rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the LoRA branch.")
    lora_targets: str | list[str] = Field(
        "all-linear", description="Module names that get an adapter, or all-linear for every linear layer."
    )
    precision: Precision = _PRECISION


class TrainerFields(AdapterFields):
    """Optimization keys shared by the stages that use TRL's trainers."""

    batch_size: int = Field(16, ge=1, description="Rows (or pairs) a forward pass.")
    batching: Literal["by_length", "shuffled"] = Field(
        "by_length",
        description="by_length: rows of similar length share a step, so that little is padded. shuffled: any rows.",
    )
    gradient_accumulation_steps: int = Field(1, ge=1, description="Forward passes an optimizer step.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training rows, where max_steps is null.")
    max_steps: int | None = Field(
        None, ge=1, description="Optimizer steps, over as many passes as they take; null: as many as epochs takes."
    )
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Share of steps with a rising learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    checkpoint_every_s: float = Field(
        30.0, gt=0, description="Seconds between checkpoints in the work folder.", json_schema_extra=UNKEYED
    )


class SftConfig(TrainerFields):
    """Supervised fine-tuning with the loss on the response only."""

    packing: Literal["none", "packed"] = Field(
        "none",
        description="packed joins a step's rows into one sequence, without padding. The model has to keep documents "
        "apart by their positions: GPT-2, Llama and Qwen do, OPT does not and is refused.",
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate; 2e-4 is usual for LoRA, 2e-5 for full.")


class SamplingConfig(StageConfig):
    """Responses sampled from the SFT model for preference pairs."""

    prompts: int = Field(512, ge=2, description="Training prompts to sample for; fewer if the split is smaller.")
    samples_per_prompt: int = Field(4, ge=1, description="Responses sampled for each prompt.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; no top-k or top-p truncation.")
    max_new_tokens: int = Field(64, ge=1, description="Longest response, tokens.")
    batch_size: int = Field(256, ge=1, description="Responses generated together.")


class LabellingConfig(StageConfig):
    """Which of two responses to a prompt is preferred, and who says so."""

    method: Literal["gold_rule", "reference_chrf", "dataset_answer", "dataset_pair"] = Field(
        description="gold_rule: the built-in world's rule on two samples. reference_chrf: the sample closer to the "
        "dataset's answer (chrF). dataset_answer: the dataset's answer over the sample. dataset_pair: the rows' own "
        "chosen and rejected responses, without samples."
    )
    pairs_per_prompt: int = Field(2, ge=1, description="Most pairs made from one prompt's samples.")

    def keyed_values(self) -> dict[str, Any]:
        """As for every stage; the rows' own pairs are all taken."""
        values = super().keyed_values()
        return {"method": self.method} if self.method == "dataset_pair" else values


class PairsConfig(StageConfig):
    """The union of all preference sources, split by prompt."""

    validation_fraction: float = Field(0.15, gt=0, lt=0.9, description="Share of prompts whose pairs are held out.")


class FeedbackConfig(StageConfig):
    """People's preferences, taken in from feedback/<recipe>/inbox."""

    max_chars: int = Field(8000, ge=10, description="Rows with a longer prompt or response go to quarantine.")


class RewardModelConfig(TrainerFields):
    """Bradley–Terry reward model: on the trunk, or on another model that is given."""

    path: str | None = Field(
        None,
        description="Folder of another model to start from than the trunk, an encoder or a decoder, with its own "
        "tokenizer. A score head that it lacks is drawn from the seed.",
        json_schema_extra=UNKEYED,
    )
    hub_name: str | None = Field(None, description="The same, on the Hugging Face hub, owner/name[@revision].")
    hub_revision: str | None = Field(None, description="Commit or tag of the hub model; null takes its main branch.")
    max_tokens: int | None = Field(
        None,
        ge=8,
        description="Pairs of which a side (prompt and response, special tokens included) is longer are dropped and "
        "counted; null: only those that the model cannot read. Of a longer text to score the end is read.",
    )
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate (TRL's default is 1e-4).")
    license: str | None = Field(
        None,
        min_length=1,
        description="Licence of a given model, an identifier such as apache-2.0, for model cards; null: not stated.",
        json_schema_extra=UNKEYED,
    )

    @property
    def is_given(self) -> bool:
        """Whether it starts from another model than the trunk."""
        return bool(self.path or self.hub_name)

    def keyed_values(self) -> dict[str, Any]:
        """As for every stage; a hub name counts only where there is one."""
        values = super().keyed_values()
        return {name: value for name, value in values.items() if self.hub_name or not name.startswith("hub_")}


class RewardClassifierConfig(StageConfig):
    """A text classifier whose score for a label is the reward: given, or trained small on labelled text."""

    label: str = Field(description="Name of the label whose score is the reward, as in the classifier's id2label.")
    path: str | None = Field(
        None, description="Folder of a sequence classifier (safetensors) and tokenizer.", json_schema_extra=UNKEYED
    )
    hub_name: str | None = Field(
        None, description="Sequence classifier on the Hugging Face hub, owner/name or owner/name@revision."
    )
    hub_revision: str | None = Field(None, description="Commit or tag of the hub model; null takes its main branch.")
    train_path: str | None = Field(
        None,
        description="JSONL file (.gz too) with text and label (a number or a name) to train a small classifier on. "
        "Relative to the recipe's folder, or to the current folder when set on the command line.",
        json_schema_extra=UNKEYED,
    )
    label_names: list[str] = Field(
        ["NEGATIVE", "POSITIVE"], min_length=2, description="Names of the labels 0, 1, … of train_path."
    )
    max_chars: int = Field(8000, ge=10, description="Labelled texts that are longer go to quarantine.")
    validation_fraction: float = Field(0.1, gt=0, lt=0.9, description="Share of labelled texts held out for accuracy.")
    vocab_size: int = Field(8000, ge=300, description="Tokens of the built byte-level BPE tokenizer, special included.")
    hidden_size: int = Field(64, ge=8, description="Width of the built encoder; an even multiple of num_heads.")
    num_layers: int = Field(1, ge=1, description="Layers of the built encoder; 1 suits a few thousand sentences.")
    num_heads: int = Field(4, ge=1, description="Attention heads a layer of the built encoder.")
    max_positions: int = Field(256, ge=8, description="Longest text of the built encoder, tokens; its end is read.")
    dropout: float = Field(0.5, ge=0, lt=1, description="Dropout while the encoder is trained; high for little data.")
    epochs: int = Field(2, ge=1, description="Passes over the labelled texts.")
    batch_size: int = Field(32, ge=1, description="Texts an optimizer step.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate, AdamW, linear to zero.")
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="Share of steps with a rising learning rate.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW weight decay.")
    checkpoint_every_s: float = Field(
        30.0, gt=0, description="Seconds between checkpoints in the work folder.", json_schema_extra=UNKEYED
    )
    license: str | None = Field(
        None,
        min_length=1,
        description="Licence of a given classifier, or of the labelled text, an identifier such as mit, for model "
        "cards; null: not stated.",
        json_schema_extra=UNKEYED,
    )

    def keyed_values(self) -> dict[str, Any]:
        """As for every stage; a given classifier leaves out what only a trained one uses, and the other way round."""
        values = super().keyed_values()
        given = {"label", "hub_name", "hub_revision"}
        if self.path or self.hub_name:
            return {name: value for name, value in values.items() if name in given}
        return {name: value for name, value in values.items() if not name.startswith("hub_")}

    def input_files(self) -> dict[str, Path]:
        """As for every stage, and the labelled text."""
        labelled = {"train_path": Path(self.train_path)} if self.train_path else {}
        return {**super().input_files(), **labelled}


class ReferenceLogprobsConfig(StageConfig):
    """Log-probabilities of the pairs' responses under the trunk, for DPO."""

    batch_size: int = Field(default=32, ge=1, description="Responses scored together.")
    precision: Precision = _PRECISION


class DpoConfig(TrainerFields):
    """Direct preference optimization against the SFT model (arXiv 2305.18290)."""

    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate.")
    beta: float = Field(0.1, gt=0, description="Strength of the KL constraint; 0.1 is the paper's.")


class PpoConfig(AdapterFields):
    """Proximal policy optimization against a reward (arXiv 1707.06347, 2403.17031)."""

    reward_function: str | None = Field(
        None,
        description="file.py:function, a reward written in Python: function(prompts, responses) takes two lists of "
        "texts and returns a list of numbers. Stands in for reward_model. Relative as data.path is.",
        json_schema_extra=UNKEYED,
    )
    updates: int = Field(40, ge=1, description="Rollout and update rounds.")
    rollout_batch_size: int = Field(64, ge=2, description="Responses sampled each round.")
    minibatch_size: int = Field(32, ge=1, description="Responses an optimizer step; divides rollout_batch_size.")
    microbatch_size: int | None = Field(
        None, ge=1, description="Responses a forward and backward pass, for less memory; null is a whole minibatch."
    )
    generation_batch_size: int = Field(128, ge=1, description="Responses sampled, and scored by the reward, together.")
    ppo_epochs: int = Field(2, ge=1, description="Passes over each round's rollout.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate of the policy.")
    value_learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate of what only the values use; null is the policy's."
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="How the learning rates fall over the updates: to zero, or not at all."
    )
    warmup_fraction: float = Field(0.0, ge=0, lt=1, description="Share of updates with rising learning rates.")
    max_new_tokens_min: int | None = Field(
        None,
        ge=1,
        description="Each response's longest length is drawn between this and max_new_tokens; null gives all the most.",
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest response, tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature, also used for every log-probability.")
    missing_eos_penalty: float = Field(
        1.0, ge=0, description="Taken off the (normalised, clipped) score of a response that does not end."
    )
    score_normalization: Literal["none", "running", "first_rollout"] = Field(
        "none",
        description="Scores less their mean, over their standard deviation: of all rollouts so far, or of the first "
        "one, which the reference policy sampled.",
    )
    score_clip: float | None = Field(None, gt=0, description="Scores are clipped to ± this; null leaves them.")
    reward_whitening: Literal["none", "scale"] = Field(
        "none", description="scale divides a rollout's per-token rewards by their standard deviation, mean kept."
    )
    kl_coef: float = Field(0.05, ge=0, description="Weight of the per-token KL penalty in the reward; the first one.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="Estimate of a token's KL in the reward, by its log-ratio x: x, x²/2, or e^-x - 1 + x."
    )
    kl_target_nats: float | None = Field(
        None, gt=0, description="KL a response that the coefficient adapts to; null keeps the coefficient fixed."
    )
    kl_horizon: int = Field(10_000, ge=1, description="Responses over which the coefficient may change by a fifth.")
    clip_range: float = Field(0.2, gt=0, description="Clip of the probability ratio around 1.")
    clip_range_high: float | None = Field(None, gt=0, description="Clip of the ratio above 1; null is clip_range.")
    dual_clip: float | None = Field(
        None, gt=1, description="Bound of the loss at negative advantages (arXiv 1912.09729, usually 3); null is none."
    )
    value_clip_range: float = Field(0.2, gt=0, description="Clip of the value estimate around its rollout value.")
    value_coef: float = Field(0.1, ge=0, description="Weight of the value loss.")
    value_trunk: Literal["shared", "detached", "separate", "reward_model"] = Field(
        "shared",
        description="What the value head reads: the policy's hidden states, with (shared) or without (detached) a "
        "gradient into them; or a trunk (with LoRA: an adapter) of its own, which starts as the policy's (separate) or "
        "as the reward model, head included. An own trunk costs time and memory, and learns more for each nat of KL.",
    )
    value_warmup_updates: int = Field(0, ge=0, description="First updates that train the value model alone.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    approx_kl_stop: float | None = Field(
        None, gt=0, description="A round's updates end before a step at which KL(old ‖ now) a token is above this."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount a token.")
    gae_lambda: float = Field(0.95, gt=0, le=1, description="GAE's bias-variance trade-off (arXiv 1506.02438).")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm is clipped to this.")
    checkpoint_every_s: float = Field(
        30.0, gt=0, description="Seconds between checkpoints in the work folder.", json_schema_extra=UNKEYED
    )

    def keyed_values(self) -> dict[str, Any]:
        """As for every stage; of a reward function its name counts, and its file by content."""
        name = self.reward_function.rpartition(":")[2] if self.reward_function else None
        return super().keyed_values() | ({"reward_function": name} if name else {})

    def input_files(self) -> dict[str, Path]:
        """The file of a reward function."""
        return {"reward_function": Path(self.reward_function.rpartition(":")[0])} if self.reward_function else {}
