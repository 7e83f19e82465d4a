"""`align dev`: the web UI shows the recipes and the runs that the command line made."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

QUERY = """{
  workspaceOrError { ... on Workspace { locationEntries { name loadStatus locationOrLoadError { __typename } } } }
  assetNodes { assetKey { path } assetMaterializations(limit: 1) { runId } }
  runsOrError(limit: 10) { ... on Runs { results { runId status jobName } } }
}"""
STARTS_WITHIN_S = 90.0  # some 17 s on a quiet machine


def ask(port: int) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql", json.dumps({"query": QUERY}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        data: dict[str, Any] = json.load(answer)["data"]
    return data


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def is_loaded(data: dict[str, Any]) -> bool:
    entries = data["workspaceOrError"].get("locationEntries", [])
    return bool(entries) and all(
        entry["loadStatus"] == "LOADED" and entry["locationOrLoadError"] is not None for entry in entries
    )


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, sid = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
            if int(sid) == session and state != "Z":
                found.append(int(folder.name))
    return found


def test_the_web_ui_shows_the_recipes_and_the_runs_of_the_command_line(
    smoke_home: Path, tmp_path: Path, align: Callable[..., Any], environment: Callable[..., dict[str, str]]
) -> None:
    home, port = tmp_path / "home", free_port()
    shutil.copytree(smoke_home, home, symlinks=True)
    (run_file,) = (home / "runs").glob("*.json")
    program = align(home, "--help").args[0]
    # Where the tests themselves run in the background Ctrl-C is ignored, which a child would inherit.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with (tmp_path / "dev.log").open("w") as log:
        process = subprocess.Popen(
            [program, "dev", "--port", str(port)], env=environment(ALIGNMENT_HOME=str(home)), stdout=log, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True, cwd=tmp_path,
        )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    try:
        deadline, data = time.monotonic() + STARTS_WITHIN_S, {}
        while not (data and is_loaded(data)):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "dev.log").read_text()
            time.sleep(0.5)
            with contextlib.suppress(urllib.error.URLError, TimeoutError, ConnectionError):
                data = ask(port)
        (entry,) = data["workspaceOrError"]["locationEntries"]
        assert entry == {
            "name": "alignment", "loadStatus": "LOADED", "locationOrLoadError": {"__typename": "RepositoryLocation"},
        }  # fmt: skip
        made_by = {
            tuple(node["assetKey"]["path"]): [event["runId"] for event in node["assetMaterializations"]]
            for node in data["assetNodes"]
        }
        run_id = run_file.stem
        assert len([key for key in made_by if key[0] == "smoke"]) == 18
        assert all(runs == [run_id] for key, runs in made_by.items() if key[0] == "smoke")
        assert ("tiny", "sft_model") in made_by
        assert {"runId": run_id, "status": "SUCCESS", "jobName": "smoke"} in data["runsOrError"]["results"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # Ctrl-C in its terminal
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        ended, deadline = process.poll() is not None, time.monotonic() + 60
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = members(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert ended and left == []
