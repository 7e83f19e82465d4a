"""How long a sequence a model can read, from its configuration file alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KEYS = ("max_position_embeddings", "n_positions")


def max_positions(artifact: Path) -> int | None:
    """Longest sequence, tokens, of the model in an artifact's `model/`; None where the model sets no limit."""
    config = artifact / "model" / "config.json"
    return positions_of(json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {})


def positions_of(values: Mapping[str, Any]) -> int | None:
    """Longest sequence, tokens, by a model's configuration; None where it sets no limit."""
    return next((int(values[key]) for key in _KEYS if isinstance(values.get(key), int)), None)
