"""The inbox of people's preferences, and the journal that the stage `human_preferences` reads.

    <home>/feedback/<recipe>/inbox/*.jsonl    votes that wait; a writer renames a whole file into this folder
    <home>/feedback/<recipe>/journal.jsonl    every vote taken in so far, each line once
    <home>/feedback/<recipe>/taken/<sha256[:16]>.jsonl    the files as they came

Belongs here: moving votes without losing or doubling one. What a vote must hold is decided by the stage.
"""

import codecs
import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alignment_pipeline.atomic import sync_directory, write_text
from alignment_pipeline.identity import digest
from alignment_pipeline.rows import UNDECODABLE_KEY


class FeedbackInbox:
    """Votes for one recipe.

    Args:
        home: Folder `ALIGNMENT_HOME`.
        recipe: The recipe's name.
    """

    def __init__(self, home: Path, recipe: str) -> None:
        self.folder = home / "feedback" / recipe
        self.inbox = self.folder / "inbox"
        self.taken = self.folder / "taken"
        self.journal = self.folder / "journal.jsonl"

    def pending(self) -> list[Path]:
        """Files that wait, in the order of their names; hidden files (a writer's temporaries) do not count."""
        return sorted(path for path in self.inbox.glob("*.jsonl") if path.is_file() and not path.name.startswith("."))

    def pending_digest(self) -> str | None:
        """Hash of what waits, whatever the files are called; None if nothing does."""
        if not self.pending():
            return None
        with self._locked():
            contents = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in self.pending())
        return digest(contents) if contents else None

    def take_in(self) -> Path:
        """Append the waiting votes to the journal, put their files away, and return the journal.

        A line that the journal holds already is not added again, so a crash between the journal and the move costs
        nothing: the files are taken in once more and add nothing.
        """
        with self._locked():
            files = {path: path.read_bytes() for path in self.pending()}
            old = self._journal_bytes()
            text, _ = _united(old, files.values())
            if not self.journal.is_file() or text.encode() != old:
                write_text(self.journal, text)
            self.taken.mkdir(parents=True, exist_ok=True)
            for path, content in files.items():
                path.replace(self.taken / f"{hashlib.sha256(content).hexdigest()[:16]}.jsonl")
            if files:
                sync_directory(self.taken)
                sync_directory(self.inbox)
        return self.journal

    def preview(self) -> tuple[str, int]:
        """Sha256 of the journal once what waits is taken in, and how many votes that adds; changes nothing."""
        waiting = []
        for path in self.pending():
            with suppress(FileNotFoundError):  # taken in since: the journal, read below, has it
                waiting.append(path.read_bytes())
        text, added = _united(self._journal_bytes(), waiting)
        return hashlib.sha256(text.encode()).hexdigest(), added

    def _journal_bytes(self) -> bytes:
        return self.journal.read_bytes() if self.journal.is_file() else b""

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.inbox.mkdir(parents=True, exist_ok=True)
        with (self.folder / "journal.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel lets go when the file closes, also after a kill
            yield


def _united(journal: bytes, files: Iterable[bytes]) -> tuple[str, int]:
    """The journal with every line of the files that it lacks, and how many those are."""
    before = _lines(journal)
    seen = set(before)
    added = [line for line in dict.fromkeys(line for content in files for line in _lines(content)) if line not in seen]
    return "".join(line + "\n" for line in (*before, *added)), len(added)


def _lines(content: bytes) -> list[str]:
    """Lines that are not blank; one that is not UTF-8 becomes a JSON line that the stage quarantines."""
    content = content.removeprefix(codecs.BOM_UTF8)
    return [_text(line) for line in content.split(b"\n") if line.strip()]


def _text(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return json.dumps({UNDECODABLE_KEY: repr(line)})
