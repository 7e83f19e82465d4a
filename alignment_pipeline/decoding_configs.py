"""Configuration of how responses are decoded, measured and compared; what `configs` says of its sections holds here."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from alignment_pipeline.configs import UNKEYED, JudgeName, PolicyName, StageConfig


class DecodingFields(StageConfig):
    """How a response is decoded: sampled, greedily, or by beams."""

    temperature: float = Field(1.0, ge=0, description="Sampling temperature of the scored responses; 0 is greedy.")
    top_k: int | None = Field(
        None, ge=1, description="Sample from the k most probable tokens only; null from all of them."
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Sample from the most probable tokens that have this share together (arXiv 1904.09751, often 0.9), "
        "after top_k; null from all.",
    )
    num_beams: int = Field(1, ge=1, description="Beams of a beam search, with temperature 0; 1 is none.")
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        description="Logits of tokens that stand in prompt or response are divided by this if positive, else "
        "multiplied (arXiv 1909.05858, there 1.2); 1 is none.",
    )
    min_new_tokens: int = Field(0, ge=0, description="Shortest response, tokens: it cannot end before.")
    max_new_tokens: int = Field(64, ge=1, description="Longest response, tokens.")

    @model_validator(mode="after")
    def _combination_can_work(self) -> Self:
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams: found {self.num_beams} with temperature {self.temperature:g}, expected temperature 0: "
                "beams do not sample"
            )
        for name in ("top_k", "top_p"):
            if getattr(self, name) is not None and self.temperature == 0:
                raise ValueError(
                    f"{name}: found {getattr(self, name):g} with temperature 0, which is greedy and does not sample; "
                    f"expected a temperature above 0, or {name} null"
                )
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: found {self.min_new_tokens}, expected at most max_new_tokens ({self.max_new_tokens})"
            )
        return self


class EvaluationConfig(DecodingFields):
    """How every policy is measured, on test prompts that no stage trained on."""

    judge: JudgeName = Field(
        description="Who scores responses, from 0 to 1. gold_rule: the built-in world's rule. reference_chrf: "
        "closeness to the dataset's answer, chrF / 100. reward_classifier: the probability of its label for prompt and "
        "response. Every table names it."
    )
    prompts: int = Field(200, ge=2, description="Test prompts; fewer if the split is smaller.")
    batch_size: int = Field(128, ge=1, description="Responses generated and scored together.")
    kl_budget_nats: float = Field(30.0, gt=0, description="A policy further from the SFT model (nats) gets a warning.")


class DecodingSweepConfig(StageConfig):
    """One policy's responses under several decoding settings, one knob changed at a time.

    Temperatures stand alone. Top-k and top-p sample at temperature 1; beams, repetition penalties, shortest and longest
    lengths go with greedy decoding.
    """

    policy: PolicyName | None = Field(
        None,
        description="Policy that answers; null is the model that policies are trained from.",
        json_schema_extra=UNKEYED,
    )
    judge: JudgeName = Field(description="Who scores responses, from 0 to 1; the evaluation's if left out of a recipe.")
    prompts: int = Field(100, ge=2, description="Test prompts; fewer if the split is smaller.")
    max_new_tokens: int = Field(64, ge=1, description="Longest response, tokens.")
    batch_size: int = Field(128, ge=1, description="Responses generated and scored together.")
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(
        [0.0, 0.5, 1.0], description="Sampling temperatures; 0 is greedy."
    )
    top_ks: list[Annotated[int, Field(ge=1)]] = Field([20], description="Values of top_k, at temperature 1.")
    top_ps: list[Annotated[float, Field(gt=0, le=1)]] = Field([0.9], description="Values of top_p, at temperature 1.")
    num_beams: list[Annotated[int, Field(ge=2)]] = Field([5], description="Numbers of beams.")
    repetition_penalties: list[Annotated[float, Field(gt=0)]] = Field(
        [1.2], description="Repetition penalties of greedy decoding."
    )
    min_new_tokens: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="Shortest responses of greedy decoding, tokens."
    )
    max_lengths: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="Longest responses of greedy decoding that are tried beside max_new_tokens, tokens."
    )

    @model_validator(mode="after")
    def _settings_can_work(self) -> Self:
        for name in ("min_new_tokens", "max_lengths"):
            longest = max(getattr(self, name), default=0)
            if longest > self.max_new_tokens:
                raise ValueError(f"{name}: found {longest}, expected at most max_new_tokens ({self.max_new_tokens})")
        knobs = (self.temperatures, self.top_ks, self.top_ps, self.num_beams, self.repetition_penalties)
        if not any((*knobs, self.min_new_tokens, self.max_lengths)):
            raise ValueError("found no value of any knob, expected at least one, for example temperatures: [0, 1]")
        return self
