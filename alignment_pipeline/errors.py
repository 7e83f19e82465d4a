"""Errors a user can cause, one class for each kind of remedy.

Every message says what was found, what was expected and what to do. The command line prints the message alone;
anything that is not an `AlignmentError` is a defect of ours and keeps its traceback.
"""

from collections.abc import Sequence


class AlignmentError(Exception):
    """Base of all errors that a user can act on."""


class RecipeError(AlignmentError, ValueError):
    """A recipe (or an override of it) has an unknown key, a wrong type or an impossible combination."""


class DataError(AlignmentError, ValueError):
    """Input data is missing, unreadable, or holds no usable row."""


class ModelError(AlignmentError, ValueError):
    """A model or tokenizer cannot be loaded safely, or has non-finite weights."""


class NonFiniteError(ModelError):
    """A NaN or an infinity turned up in training; nothing that has seen it is kept.

    Attributes:
        row_ids: Dataset rows of the batch that it turned up in.
    """

    def __init__(self, what: str, row_ids: Sequence[str]) -> None:
        self.row_ids = tuple(row_ids)
        shown = ", ".join(self.row_ids[:4]) + (" and others" if len(self.row_ids) > 4 else "")
        super().__init__(f"Found {what} that is a NaN or an infinity, in {len(self.row_ids)} responses (rows {shown})")


class StoreError(AlignmentError):
    """The artifact store cannot be read or written, or an artifact in it fails verification."""


class MissingArtifactError(StoreError):
    """A stage was asked to run before what it reads from has been made."""


class LeaseLostError(StoreError):
    """Another process took over this computation; its result stands and ours is discarded."""
