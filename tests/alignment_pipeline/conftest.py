"""Small real things for the library's tests: the smoke recipe's artifacts, tiny models, a tokenizer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alignment_pipeline.configs import RewardModelConfig, StageConfig
from alignment_pipeline.graph import StageNode, build_graph
from alignment_pipeline.models import new_scorer, save_trained, with_adapter
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.recipe import load_recipe
from alignment_pipeline.stage import StageResult, StageSpec, stage_function

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = ["### Instruction:\nAdd one to x.\n\n### Response:\n", "def add_one(x: int) -> int:\n    return x + 1\n"]


class Smoke:
    """The smoke recipe's artifacts, each computed by its library stage when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.graph: Mapping[str, StageNode] = build_graph(load_recipe(REPOSITORY / "recipes" / "smoke.yaml"))
        self.results: dict[str, StageResult] = {}
        self._folder = folder

    def artifact(self, asset: str) -> Path:
        """Folder of an asset's artifact; its parents are computed first."""
        folder = self._folder / asset
        if asset not in self.results:
            self.results[asset] = self.run(asset, folder)
        return folder / "output"

    def config(self, asset: str, **changes: Any) -> StageConfig:
        """The recipe's configuration of an asset, with some values changed."""
        config = self.graph[asset].config
        return type(config).model_validate(config.model_dump() | changes)

    def spec(self, asset: str, folder: Path, inputs: Mapping[str, Path] | None = None, **changes: Any) -> StageSpec:
        """A spec of the asset's stage that writes below `folder`; `inputs` replaces some of its inputs."""
        parents = {name: self.artifact(parent) for name, parent in self.graph[asset].inputs.items()}
        output, work = folder / "output", folder / "work"
        output.mkdir(parents=True)
        work.mkdir(exist_ok=True)
        return StageSpec(self.config(asset, **changes), parents | dict(inputs or {}), output, work, seed=0)

    def run(self, asset: str, folder: Path, log: ProgressLog | None = None, **changes: Any) -> StageResult:
        """Compute an asset once more, below `folder`; `changes` as for `spec`."""
        spec = self.spec(asset, folder, **changes)
        return stage_function(self.graph[asset].stage)(spec, log or ProgressLog(folder / "progress.jsonl"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # models this small lose more than they gain by more


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Smoke:
    return Smoke(tmp_path_factory.mktemp("smoke"))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens whose padding and end tokens differ."""
    from alignment_pipeline.stages.base_model import build_tokenizer

    return build_tokenizer(DOCUMENTS, vocab_size=300, max_tokens=64)


@dataclasses.dataclass(frozen=True)
class TinyModels:
    """Random models of two layers over the fixture's tokenizer, by architecture."""

    tokenizer: PreTrainedTokenizerFast
    architectures: Sequence[str] = ("opt", "opt_projected", "gpt2", "llama")

    def build(self, architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
        """A model in evaluation mode. `opt_projected` has opt-350m's shape: embeddings narrower than layers."""
        tokens = {"pad_token_id": self.tokenizer.pad_token_id, "eos_token_id": self.tokenizer.eos_token_id,
                  "bos_token_id": self.tokenizer.bos_token_id, "vocab_size": len(self.tokenizer)}  # fmt: skip
        opt = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
               "max_position_embeddings": 64, "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.3}  # fmt: skip
        torch.manual_seed(seed)
        if architecture.startswith("opt"):
            width = 8 if architecture == "opt_projected" else 16
            model = OPTForCausalLM(OPTConfig(**(tokens | opt | {"word_embed_proj_dim": width} | changes)))
        elif architecture == "gpt2":
            gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                    "attn_pdrop": 0.0, "initializer_range": 0.3}  # fmt: skip
            model = GPT2LMHeadModel(GPT2Config(**(tokens | gpt2 | changes)))
        elif architecture == "qwen3":
            qwen3 = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
                     "initializer_range": 0.3, "tie_word_embeddings": True}  # fmt: skip
            model = Qwen3ForCausalLM(Qwen3Config(**(tokens | qwen3 | changes)))
        else:
            llama = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
            model = LlamaForCausalLM(LlamaConfig(**(tokens | llama | changes)))
        return model.eval()

    def save(self, model: PreTrainedModel, artifact: Path) -> Path:
        """Write model and tokenizer to `artifact/model`, without the library's own `save_model`."""
        model.save_pretrained(artifact / "model")
        self.tokenizer.save_pretrained(artifact / "model")
        return artifact


@pytest.fixture(scope="session")
def tiny_models(tokenizer: PreTrainedTokenizerFast) -> TinyModels:
    return TinyModels(tokenizer)


@pytest.fixture
def reward_artifact(tiny_models: Any, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """A trunk, and a reward model that was trained on it with LoRA: nothing of its adapter and head is zero."""

    def made(architecture: str) -> tuple[Path, Path]:
        trunk = tiny_models.save(tiny_models.build(architecture), tmp_path / "adapted" / "trunk")
        model = with_adapter(new_scorer(trunk / "model"), RewardModelConfig(lora_rank=3), "SEQ_CLS")
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.2)
        save_trained(model, tiny_models.tokenizer, tmp_path / "adapted" / "reward")
        return trunk, tmp_path / "adapted" / "reward"

    return made


@pytest.fixture
def log(tmp_path: Path) -> ProgressLog:
    return ProgressLog(tmp_path / "progress.jsonl")
