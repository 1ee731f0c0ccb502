"""Repositories of a hub that is a server here: what is fetched, and what a user reads if it is not."""

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from erv_min.base import hub
from erv_min.base.errors import CheckpointError

COMMIT, SIZE = "a" * 40, 12_000_000
MODEL = ["config.json", "README.md", "text_gate/tokenizer.json", "model.safetensors",
         "model.fp32-00001-of-00002.safetensors"]
FILES = {"o/whole": [*MODEL, "pytorch_model.bin"], "o/reset": MODEL, "o/slow": MODEL, "o/gated": MODEL,
         "o/forbidden": MODEL, "o/noconfig": ["model.safetensors"], "o/empty": ["config.json", "adapter.safetensors"],
         "o/bin": ["config.json", "pytorch_model-00001-of-00001.bin"]}


class Hub(BaseHTTPRequestHandler):
    """As huggingface.co answers, with a repository for each way to fail."""
    protocol_version = "HTTP/1.1"
    asked: list = []

    def reply(self, status: int, body: bytes, **headers) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        listing = re.fullmatch(r"/api/models/(\w+/\w+)(/revision/\w+)?", self.path)
        if listing and listing[1] not in FILES:
            return self.reply(401, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
        if listing and listing[2]:
            return self.reply(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id: v2")
        if listing:
            files = [{"rfilename": name} for name in FILES[listing[1]]]
            return self.reply(200, json.dumps({"id": listing[1], "sha": COMMIT, "siblings": files}).encode())
        if not (file := re.fullmatch(r"/(\w+/\w+)/resolve/main/(.*)", self.path)):
            return self.reply(404, b"")
        name, big = file[1], file[2].endswith((".safetensors", ".bin"))
        if name in ("o/gated", "o/forbidden"):
            return self.reply(401 if name == "o/gated" else 403, b"", X_Error_Code="GatedRepo",
                              X_Error_Message=f"Access to model {name} is restricted. Please log in.")
        if file[2] not in FILES[name]:
            return self.reply(404, b"", X_Error_Code="EntryNotFound")
        body = bytes(SIZE) if big else b"{}"
        about = {"ETag": f'"{sha1(self.path.encode()).hexdigest()}"', "X_Repo_Commit": COMMIT}
        if self.command == "HEAD" or not big:
            return self.reply(200, body, **about)
        self.asked.append(file[0])
        if name == "o/reset" and self.asked.count(file[0]) < 3:
            self.reply(200, body[: SIZE // 2], **about | {"Content_Length": SIZE})
            time.sleep(0.2)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif name == "o/slow":
            self.reply(200, b"", **about | {"Content_Length": SIZE})
            for _ in range(1200):
                self.wfile.write(bytes(10_000))
                time.sleep(0.1)
        else:
            self.reply(200, body, **about)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def fetch(tmp_path_factory):
    """fetch(arguments of `resolve`, ...) -> a running process, which prints each folder or error."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # a client that was stopped
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    code = """if True:
        import json, signal, sys
        from erv_min.base import hub
        from erv_min.base.processes import run_script
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
        hub.WAITS = (0.1, 0.1)
        def resolve(arguments):
            try:
                folder = hub.resolve(**arguments)
                return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
            except hub.CheckpointError as error:
                return str(error)
        run_script(lambda: print(json.dumps([resolve(x) for x in json.loads(sys.argv[1])])))"""
    home = tmp_path_factory.mktemp("home")
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "",
                                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    yield lambda *calls, **more: subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(calls)], env=environment | more, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    server.shutdown()
    server.server_close()


def test_what_is_fetched_and_what_a_user_reads_if_not(fetch):
    process = fetch(*({"folder_or_repo": name} for name in ("o/whole", "o/reset", "o/bin", "o/gated", "o/forbidden",
                                                            "o/misspelt", "o/noconfig", "o/empty")),
                    {"folder_or_repo": "o/whole", "revision": "v2"}, {"folder_or_repo": "o/empty", "weights": False})
    out, said = process.communicate()
    whole, reset, old, gated, forbidden, misspelt, noconfig, empty, revision, config = json.loads(out)
    assert whole == reset == ["config.json", "model.safetensors", "text_gate/tokenizer.json"]
    assert old == ["config.json", "pytorch_model-00001-of-00001.bin"] and config == ["config.json"]
    broken = re.findall("o/reset: model.safetensors: (?:ReadError|ChunkedEncodingError)", said)  # by httpx or requests
    assert len(broken) == 2 and "asking again in 0.1 s, whole files are" in said
    for error, name in ((gated, "o/gated"), (forbidden, "o/forbidden")):  # the hub's own sentence and what to do
        assert f"Access to model {name} is restricted. Please log in." in error and "HF_TOKEN" in error
        assert "hf download" not in error  # it asks the same server
    assert "RepositoryNotFoundError" in misspelt and "o/misspelt" in misspelt and "Check the name" in misspelt
    assert "Invalid rev id: v2" in revision or "RevisionNotFound" in revision
    assert revision.startswith("o/whole --revision v2: ") and "Check the name (and --revision)" in revision
    assert "o/noconfig/resolve/main/config.json" in noconfig and "404" in noconfig
    assert empty == ["config.json"]  # base/weights.py names what a folder lacks


def test_without_a_network_the_cache_is_enough_or_the_cause_is_told(fetch):
    fetch({"folder_or_repo": "o/whole"}, {"folder_or_repo": "o/empty", "weights": False}).communicate()
    calls = [{"folder_or_repo": name} for name in ("o/whole", "o/empty", "o/bin2")]
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):  # the discard port: nobody listens
        whole, part, absent = json.loads(fetch(*calls, **more).communicate()[0])
        assert whole == ["config.json", "model.safetensors", "text_gate/tokenizer.json"]
        assert part == ["config.json"]
        assert ("offline mode is enabled" if "HF_HUB_OFFLINE" in more else "Connection refused") in absent
        assert "hf download o/bin2" in absent


def test_ctrl_c_ends_a_download(fetch):
    process = fetch({"folder_or_repo": "o/slow"})  # two minutes of it
    while not any("slow" in path for path in Hub.asked):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=100)
    assert said.endswith("stopped by Ctrl-C\n") and process.returncode == 1 and not out


def test_a_full_disk_is_told_at_once(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    listing = SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors")])
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: listing)
    monkeypatch.setattr(hub, "hf_hub_download", full)
    with pytest.raises(CheckpointError, match="No space left on device.*Make room, or set HF_HOME"):
        hub.resolve("a/b")
