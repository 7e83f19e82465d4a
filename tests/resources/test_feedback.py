import hashlib
import json
import multiprocessing
from pathlib import Path

import pytest

from alignment_pipeline.rows import parse_jsonl
from resources import feedback
from resources.feedback import FeedbackInbox


@pytest.fixture
def inbox(tmp_path: Path) -> FeedbackInbox:
    made = FeedbackInbox(tmp_path, "tiny")
    made.inbox.mkdir(parents=True)
    return made


def journal_lines(inbox: FeedbackInbox) -> list[bytes]:
    return inbox.journal.read_bytes().splitlines()


def test_waiting_votes_are_appended_in_order_and_put_away(inbox: FeedbackInbox) -> None:
    (inbox.inbox / "b.jsonl").write_bytes(b'{"n": 2}\n{"n": 3}')
    (inbox.inbox / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 1}\n\n')
    (inbox.inbox / ".c.jsonl").write_bytes(b"half writ")
    (inbox.inbox / "notes.txt").write_bytes(b"x")
    assert [path.name for path in inbox.pending()] == ["a.jsonl", "b.jsonl"]
    assert inbox.take_in() == inbox.journal
    assert inbox.journal.read_bytes() == b'{"n": 1}\n{"n": 2}\n{"n": 3}\n'
    assert inbox.pending() == []
    assert {path.read_bytes() for path in inbox.taken.iterdir()} == {b'\xef\xbb\xbf{"n": 1}\n\n', b'{"n": 2}\n{"n": 3}'}
    assert sorted(path.name for path in inbox.inbox.iterdir()) == [".c.jsonl", "notes.txt"]


def test_a_line_is_in_the_journal_once(inbox: FeedbackInbox) -> None:
    (inbox.inbox / "a.jsonl").write_bytes(b'{"n": 1}\n{"n": 1}\n{"n": 1 }\n')
    inbox.take_in()
    (inbox.inbox / "again.jsonl").write_bytes(b'{"n": 2}\n{"n": 1}\n')
    inbox.take_in()
    assert journal_lines(inbox) == [b'{"n": 1}', b'{"n": 1 }', b'{"n": 2}']


def test_a_preview_says_what_taking_in_then_makes_of_the_journal_and_changes_nothing(inbox: FeedbackInbox) -> None:
    assert inbox.preview() == (hashlib.sha256(b"").hexdigest(), 0)
    inbox.journal.write_bytes(b'{"n": 1}\n{"n": 1}')
    (inbox.inbox / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 2}\r\n{"n": 1}\n{"n": "\xff"}')
    (inbox.inbox / "b.jsonl").write_bytes(b'{"n": 3}\n{"n": 3}\n\n')
    (inbox.inbox / ".c.jsonl").write_bytes(b"half writ")
    before = sorted((path, path.stat().st_mtime_ns) for path in inbox.folder.rglob("*"))
    sha256, added = inbox.preview()
    assert sorted((path, path.stat().st_mtime_ns) for path in inbox.folder.rglob("*")) == before
    assert (hashlib.sha256(inbox.take_in().read_bytes()).hexdigest(), len(journal_lines(inbox)) - 2) == (sha256, added)
    assert added == 3 and inbox.preview() == (sha256, 0)


def test_a_journal_edited_by_hand_without_a_last_line_end_is_not_glued_together(inbox: FeedbackInbox) -> None:
    inbox.journal.write_bytes(b'{"n": 1}')
    (inbox.inbox / "a.jsonl").write_bytes(b'{"n": 2}\r\n')
    inbox.take_in()
    assert inbox.journal.read_bytes() == b'{"n": 1}\n{"n": 2}\r\n'


def test_a_line_that_is_not_utf8_is_kept_for_quarantine(inbox: FeedbackInbox) -> None:
    (inbox.inbox / "a.jsonl").write_bytes(b'{"n": "\xff"}\n{"n": "\xc3\xa9\xe2\x80\xa8"}\n')
    inbox.take_in()
    first, second = parse_jsonl(inbox.journal.read_bytes())
    assert first.value == {"undecodable": repr(b'{"n": "\xff"}')}
    assert second.value == {"n": "é\u2028"}


def test_a_crash_between_the_journal_and_the_move_costs_and_doubles_nothing(
    inbox: FeedbackInbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    (inbox.inbox / "a.jsonl").write_bytes(b'{"n": 1}\n{"n": "\xff"}\n')
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", crash_unless_temporary)
        with pytest.raises(KeyboardInterrupt):
            inbox.take_in()
    assert len(journal_lines(inbox)) == 2
    assert [path.name for path in inbox.pending()] == ["a.jsonl"]
    inbox.take_in()
    assert len(journal_lines(inbox)) == 2
    assert inbox.pending() == []


_replace = Path.replace


def crash_unless_temporary(path: Path, target: Path) -> Path:
    if path.suffix == ".tmp":
        return _replace(path, target)
    raise KeyboardInterrupt


def test_a_crash_before_the_journal_leaves_the_files_waiting(
    inbox: FeedbackInbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    (inbox.inbox / "a.jsonl").write_bytes(b'{"n": 1}\n')

    def fail(path: Path, text: str) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(feedback, "write_text", fail)
        with pytest.raises(OSError, match="no space left"):
            inbox.take_in()
    assert len(inbox.pending()) == 1
    inbox.take_in()
    assert journal_lines(inbox) == [b'{"n": 1}']


def test_the_digest_names_what_waits_and_not_the_files(inbox: FeedbackInbox) -> None:
    assert inbox.pending_digest() is None
    (inbox.inbox / "a.jsonl").write_bytes(b'{"n": 1}\n')
    (inbox.inbox / "b.jsonl").write_bytes(b'{"n": 2}\n')
    first = inbox.pending_digest()
    (inbox.inbox / "a.jsonl").rename(inbox.inbox / "z.jsonl")
    assert first is not None and inbox.pending_digest() == first
    (inbox.inbox / "c.jsonl").write_bytes(b'{"n": 3}\n')
    assert inbox.pending_digest() not in (first, None)
    inbox.take_in()
    assert inbox.pending_digest() is None


def test_a_recipe_without_feedback_has_an_empty_journal_and_looking_creates_nothing(tmp_path: Path) -> None:
    inbox = FeedbackInbox(tmp_path, "other")
    assert inbox.pending() == [] and inbox.pending_digest() is None
    assert list(tmp_path.iterdir()) == []
    assert inbox.take_in().read_bytes() == b""


def test_nothing_new_leaves_the_journal_file_alone(inbox: FeedbackInbox) -> None:
    (inbox.inbox / "a.jsonl").write_bytes(b'{"n": 1}\n')
    before = inbox.take_in().stat().st_mtime_ns
    (inbox.inbox / "b.jsonl").write_bytes(b'{"n": 1}\n')
    assert inbox.take_in().stat().st_mtime_ns == before


def write_and_take_in(home: Path, writer: int) -> None:
    inbox = FeedbackInbox(home, "tiny")
    for number in range(20):
        waiting = inbox.inbox / f".{writer}-{number}"
        waiting.write_text(json.dumps({"writer": writer, "number": number}) + "\n")
        waiting.rename(inbox.inbox / f"{writer}-{number}.jsonl")
        inbox.pending_digest()
        inbox.take_in()


def test_processes_that_take_in_at_once_lose_and_double_no_vote(inbox: FeedbackInbox, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_and_take_in, args=(tmp_path, writer)) for writer in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join(timeout=60)
    assert [process.exitcode for process in writers] == [0] * 4
    lines = journal_lines(inbox)
    assert len(lines) == len(set(lines)) == 80
    assert len(list(inbox.taken.iterdir())) == 80
