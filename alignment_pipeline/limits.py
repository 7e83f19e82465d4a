"""How long a sequence a model can read, from its configuration file alone."""

import json
from pathlib import Path

_KEYS = ("max_position_embeddings", "n_positions")


def max_positions(artifact: Path) -> int | None:
    """Longest sequence, tokens, of the model in an artifact's `model/`; None where the model sets no limit."""
    config = artifact / "model" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return next((int(values[key]) for key in _KEYS if isinstance(values.get(key), int)), None)
