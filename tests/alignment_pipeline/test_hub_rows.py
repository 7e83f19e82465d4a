import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from alignment_pipeline.hub_rows import note_content
from alignment_pipeline.rows import Values

RECORDS = [{"instruction": "Say ü.", "output": "ü"}, {"instruction": "Say \u2028.", "output": "two"}]
ARRAY = json.dumps(RECORDS, indent=2, ensure_ascii=False).encode()
HUB_NAME = "sahil2801/CodeAlpaca-20k"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_home(tmp_path: Path) -> Path:
    """A hub cache that holds one small dataset, laid out as huggingface_hub does."""
    repository = tmp_path / "home" / "hub" / f"datasets--{HUB_NAME.replace('/', '--')}"
    for folder in ("refs", f"snapshots/{COMMIT}"):
        (repository / folder).mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots" / COMMIT / "code_alpaca_20k.json").write_bytes(ARRAY)
    return tmp_path / "home"


def commit_of(home: Path, name: str, commit: str, files: dict[str, str], ref: str = "main") -> None:
    """Put another commit of a dataset into the cache, and a name for it."""
    repository = home / "hub" / f"datasets--{name.replace('/', '--')}"
    for path, text in files.items():
        file = repository / "snapshots" / commit / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(commit)


def load_in_subprocess(home: Path, *arguments: str | None, **variables: str) -> "subprocess.CompletedProcess[str]":
    # The hub libraries read their environment when they are imported, hence another process.
    code = (
        "import json, sys\n"
        "from alignment_pipeline.errors import DataError\n"
        "from alignment_pipeline.hub_rows import read_hub_chunks\n"
        "try:\n"
        "    chunks, commit = read_hub_chunks(*json.loads(sys.argv[1]))\n"
        "    print(json.dumps([commit, [row for chunk in chunks for row in chunk.rows()]]))\n"
        "except DataError as error:\n"
        "    sys.exit(f'DataError: {error}')\n"
    )
    unset = {"HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= variables
    return subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        env=environment, capture_output=True, text=True, timeout=120, cwd=home,
    )  # fmt: skip


def test_a_hub_dataset_is_read_from_the_local_cache_without_a_network(hub_home: Path) -> None:
    for revision in (None, "main", COMMIT):
        done = load_in_subprocess(hub_home, HUB_NAME, revision, "train")
        assert done.returncode == 0, done.stderr
        commit, rows = json.loads(done.stdout)
        assert commit == COMMIT
        assert [row[:2] for row in rows] == [[1, RECORDS[0]], [2, RECORDS[1]]]


@pytest.mark.parametrize(
    "arguments",
    [
        ("sahil2801/absent", None, "train"),
        (HUB_NAME, "v2", "train"),
        (HUB_NAME, "f" * 40, "train"),
        (HUB_NAME, None, "no"),
    ],
)
def test_a_hub_dataset_that_cannot_be_loaded_says_what_to_do_without_a_network(
    hub_home: Path, arguments: tuple[str | None, ...]
) -> None:
    if arguments[1] is not None:  # a prepared copy of another revision must not stand in for the one asked for
        assert load_in_subprocess(hub_home, HUB_NAME, None, "train").returncode == 0
    done = load_in_subprocess(hub_home, *arguments)
    assert done.returncode == 1
    message = done.stderr[done.stderr.index("DataError: ") :]
    assert str(arguments[0]) in message
    assert "--set data.path=FILE" in message


def test_a_pinned_revision_is_read_though_the_cache_holds_a_newer_one(hub_home: Path) -> None:
    newer = "f" * 40
    commit_of(hub_home, HUB_NAME, newer, {"code_alpaca_20k.json": '[{"instruction": "new", "output": "new"}]'})
    for revision, commit, rows in ((None, newer, 1), (COMMIT, COMMIT, 2), (newer, newer, 1), (COMMIT, COMMIT, 2)):
        done = load_in_subprocess(hub_home, HUB_NAME, revision, "train")
        assert done.returncode == 0, done.stderr
        found, read = json.loads(done.stdout)
        assert (found, len(read)) == (commit, rows)


def test_a_folder_or_a_configuration_of_a_hub_dataset_is_read_alone(hub_home: Path) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("one", "two"))
    card = f"---\nconfigs:\n{configs}---\n"
    files = {"one/a.jsonl": '{"a": "1"}\n', "two/b.jsonl": '{"b": 2}\n'}
    commit_of(hub_home, "owner/configured", COMMIT, {"README.md": card, **files})
    commit_of(hub_home, "owner/folders", COMMIT, {"x/train.jsonl": '{"a": "1"}\n', "y/train.jsonl": '{"a": "2"}\n'})
    for arguments, expected in (
        (("owner/configured", None, "train", "one"), {"a": "1"}),
        (("owner/configured", None, "train", "two"), {"b": 2}),
        (("owner/folders", None, "train", None, "y"), {"a": "2"}),
    ):
        done = load_in_subprocess(hub_home, *arguments)
        assert done.returncode == 0, done.stderr
        assert [row[1] for row in json.loads(done.stdout)[1]] == [expected]
    done = load_in_subprocess(hub_home, "owner/configured", None, "train", "three")
    assert done.returncode == 1 and "config three" in done.stderr and "data.hub_config" in done.stderr


class HubOfOneDataset(BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub, for one commit of one dataset; `fetched` are the files it was asked for."""

    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[set[str]] = set()

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        if "/tree/" in self.path:
            tree = [
                {"type": "file", "path": name, "size": len(text), "oid": hashlib.sha1(text).hexdigest()}
                for name, text in self.files.items()
            ]
            body = json.dumps(tree).encode()
        elif self.path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "owner/folders", "sha": COMMIT, "siblings": siblings}).encode()
        else:
            name = self.path.split(f"/resolve/{COMMIT}/")[1]
            self.fetched.add(name)
            body = self.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Write nothing."""


@pytest.fixture
def hub_server() -> Iterator[str]:
    HubOfOneDataset.files = {
        "README.md": b"", "x/train.jsonl": b'{"a": "1"}\n', "x/y/train.jsonl": b'{"a": "2"}\n',
        "y/train.jsonl": b'{"a": "3"}\n', "y.json": b'{"a": "4"}\n',
    }  # fmt: skip
    HubOfOneDataset.fetched = set()
    with ThreadingHTTPServer(("127.0.0.1", 0), HubOfOneDataset) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("data_dir", ["y", "./y/"])
def test_of_a_hub_dataset_only_the_folder_that_is_read_is_fetched(
    hub_server: str, tmp_path: Path, data_dir: str
) -> None:
    online = {"HF_ENDPOINT": hub_server, "HF_HUB_OFFLINE": "0"}
    done = load_in_subprocess(tmp_path, "owner/folders", None, "train", None, data_dir, **online)
    assert done.returncode == 0, done.stderr
    assert [row[1] for row in json.loads(done.stdout)[1]] == [{"a": "3"}]
    assert HubOfOneDataset.fetched == {"README.md", "y/train.jsonl"}
    again = load_in_subprocess(tmp_path, "owner/folders", None, "train", None, data_dir)
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr


def test_the_content_of_a_hub_dataset_is_its_rows_in_canonical_json_and_no_chunk_size_changes_it() -> None:
    values = [{"b": "ü\u2028", "a": date(2020, 1, 2)}, {"b": None, "a": [float("nan")]}, {"b": "\ud800"}]
    lines = '{"a":"datetime.date(2020, 1, 2)","b":"ü\u2028"}\n{"a":[NaN],"b":null}\n{"b":"\ud800"}\n'
    expected = hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()
    for parts in ([values], [values[:1], values[1:]]):
        source: dict[str, Any] = {"commit": "c"}
        chunks = note_content(iter([Values(1, part) for part in parts]), source)
        assert source == {"commit": "c"}
        assert [value for chunk in chunks for value in chunk.values] == values
        assert source == {"commit": "c", "rows": 3, "content_sha256": expected}
