"""`rollouts.jsonl`: every response that PPO sampled, one row each, in the order of the updates.

The table grows in the work folder while the policy is trained. A checkpoint is of a number of updates, and so of a
number of rows: a resumed training cuts off what came after it, and ends with the table of one that was never stopped.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignment_pipeline.errors import StoreError
from alignment_pipeline.identity import canonical_json
from alignment_pipeline.ppo.rollout import Rollout

ROLLOUTS_FILE = "rollouts.jsonl"
TABLES = 10  # updates that the samples are taken from
ROWS_A_TABLE = 4


class RolloutTable:
    """The table in a work folder, written by the main process, which holds every row whatever processes share the work.

    Args:
        work_dir: Folder that survives a crash.
        rollout_batch_size: Rows an update.
    """

    def __init__(self, work_dir: Path, rollout_batch_size: int) -> None:
        self.path = work_dir / ROLLOUTS_FILE
        self._rollout_batch_size = rollout_batch_size

    def cut(self, updates: int) -> None:
        """Keep the rows of the first updates only; makes the file if there is none.

        Raises:
            StoreError: It holds fewer rows than that.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            file.seek(0)
            for row in range(updates * self._rollout_batch_size):
                if not file.readline().endswith(b"\n"):
                    raise StoreError(
                        f"{self.path}: found {row} rows, expected {self._rollout_batch_size} of each of the {updates} "
                        f"updates done. Delete {self.path.parent} and run again: the training starts anew."
                    )
            file.truncate(file.tell())

    def append(self, update: int, rollout: Rollout) -> None:
        """Add an update's responses, with the scores that the reward gave them."""
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.writelines(canonical_json(row) + "\n" for row in _rows(update, rollout))

    def make_durable(self) -> None:
        """Have the rows on the disk, for a checkpoint that counts on them."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def samples(self, updates: int) -> Iterator[dict[str, Any]]:
        """The first rows of evenly spaced updates: a table that a person can read."""
        tabled = tabled_updates(updates)
        with self.path.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                update, row = divmod(number, self._rollout_batch_size)
                if update in tabled and row < ROWS_A_TABLE:
                    yield json.loads(line)


def tabled_updates(updates: int) -> set[int]:
    """Evenly spaced updates (from 0), the first and the last among them."""
    return {round(number * (updates - 1) / max(1, TABLES - 1)) for number in range(TABLES)}


def _rows(update: int, rollout: Rollout) -> Iterator[dict[str, Any]]:
    scores, kls = rollout.scores.tolist(), rollout.kl_nats.tolist()
    for prompt, response, score, kl in zip(rollout.prompts, rollout.responses, scores, kls, strict=True):
        yield {
            "update": update,
            "prompt_id": prompt.row_id,
            "prompt": prompt.text,
            "response": response.text,
            "score": score,
            "kl_nats": kl,
            "tokens": len(response.token_ids),
            "ended": response.ended,
        }
