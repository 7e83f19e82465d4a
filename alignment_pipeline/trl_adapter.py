"""The one place that touches TRL's private API, held by `tests/alignment_pipeline/test_trl_adapter.py`.

1. TRL's fused language-model head scores every position on a CPU and only the labelled ones on a GPU. Scoring the
   labelled ones everywhere gives the same loss and gradients and takes less than half the time.
2. DPOTrainer cannot take rows that are tokenized already, and recomputes reference log-probabilities whenever its
   configuration changes. `TokenizedDPOTrainer` takes both as columns.
"""

from typing import Any

import trl.trainer.utils
from trl import DPOTrainer


def score_labelled_positions_only() -> None:
    """Make TRL's fused head skip positions without a label on every device (it does so on CUDA by itself)."""
    if not hasattr(trl.trainer.utils, "_use_triton"):
        raise ImportError(
            "trl.trainer.utils has no _use_triton: this TRL version needs a new adapter (see trl_adapter)."
        )
    trl.trainer.utils._use_triton = lambda device: True


class TokenizedDPOTrainer(DPOTrainer):  # type: ignore[misc]  # trl is untyped here
    """DPOTrainer over rows with prompt_ids, chosen_ids, rejected_ids, ref_chosen_logps and ref_rejected_logps."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset
