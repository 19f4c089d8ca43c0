"""A Hugging Face Hub in memory, on localhost: repositories, uploads (regular and LFS), downloads.

Speaks the HTTP that huggingface_hub speaks, so that the real client code runs in tests.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """``with FakeHub() as hub``: `hub.url` for HF_ENDPOINT, `hub.repos[repo_id][file]` the bytes that arrived."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.commits: list[str] = []
        self.token = "hf_test"
        # Answers to give instead, each once: part of "METHOD path" to a status, or to 0 for a dropped connection.
        self.trouble: list[tuple[str, int]] = []

    def __enter__(self) -> "FakeHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_) -> None:
                pass

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def is_in_trouble(self) -> bool:
                """Whether the request was answered, or not, as the test wants."""
                asked = f"{self.command} {self.path}"
                for place, (part, status) in enumerate(hub.trouble):
                    if part in asked:
                        del hub.trouble[place]
                        if status:
                            self.body()
                            self.answer({"error": "trouble"}, status)
                        self.close_connection = True
                        return True
                if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self.body()
                    self.answer({"error": "Invalid username or password."}, 401)
                    return True
                return False

            def answer(self, content: bytes | dict, status: int = 200, **headers: str) -> None:
                if isinstance(content, dict):
                    content = json.dumps(content).encode()
                    headers.setdefault("Content-Type", "application/json")
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def missing(self, code: str) -> None:
                self.answer({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

            def do_GET(self) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                if self.is_in_trouble():
                    return None
                path = self.path.split("?")[0]
                if path == "/api/whoami-v2":
                    return self.answer({"type": "user", "name": "me", "orgs": []})
                if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.*)?", path):
                    if match[1] not in hub.repos:
                        return self.missing("RepoNotFound")
                    files = [{"rfilename": name} for name in hub.repos[match[1]]]
                    return self.answer({"id": match[1], "sha": COMMIT, "siblings": files, "tags": [], "private": False})
                if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
                    entries = [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in hub.repos[match[1]].items()
                    ]
                    return self.answer(json.dumps(entries).encode(), Content_Type="application/json")
                if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
                    if match[1] not in hub.repos:
                        return self.missing("RepoNotFound")
                    if match[2] not in hub.repos[match[1]]:
                        return self.missing("EntryNotFound")
                    content = hub.repos[match[1]][match[2]]
                    tag = hashlib.sha256(content).hexdigest()
                    return self.answer(content, ETag=f'"{tag}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
                self.missing("EntryNotFound")

            do_HEAD = do_GET

            def do_PUT(self) -> None:
                hub.requests.append(f"PUT {self.path}")
                if self.is_in_trouble():
                    return
                hub.lfs[self.path.rpartition("/")[2]] = self.body()
                self.answer(b"")

            def do_POST(self) -> None:
                hub.requests.append(f"POST {self.path}")
                if self.is_in_trouble():
                    return None
                body = self.body()
                path = self.path.split("?")[0]
                if path == "/api/repos/create":
                    asked = json.loads(body)
                    repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
                    hub.repos.setdefault(repo_id, {})
                    return self.answer({"url": f"{hub.url}/{repo_id}", "id": repo_id, "name": repo_id})
                if path == "/api/validate-yaml":
                    return self.answer({"errors": [], "warnings": []})
                if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/.*", path):
                    files = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                            "shouldIgnore": False,
                            "oid": None,
                        }
                        for file in json.loads(body)["files"]
                    ]
                    return self.answer({"files": files, "commitOid": COMMIT})
                if path.endswith("/info/lfs/objects/batch"):
                    actions = lambda oid: {"upload": {"href": f"{hub.url}/lfs/{oid}", "header": {}}}  # noqa: E731
                    objects = [  # what is there need not be sent again
                        {**item, **({} if item["oid"] in hub.lfs else {"actions": actions(item["oid"])})}
                        for item in json.loads(body)["objects"]
                    ]
                    return self.answer({"transfer": "basic", "objects": objects})
                if re.fullmatch(r"/api/models/[^/]+/[^/]+/branch/.*", path):
                    return self.answer({})
                if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/.*", path):
                    hub.commits.append(f"{path} {self.path.partition('?')[2]}".strip())
                    hub.store(match[1], [json.loads(line) for line in body.splitlines() if line.strip()])
                    commit = {"commitUrl": f"{hub.url}/{match[1]}/commit/{COMMIT}", "commitOid": COMMIT}
                    if "create_pr=1" in self.path:
                        commit["pullRequestUrl"] = f"{hub.url}/{match[1]}/discussions/1"
                    return self.answer({**commit, "success": True, "hookOutput": ""})
                self.missing("EntryNotFound")

        return Handler

    def store(self, repo_id: str, operations: list[dict]) -> None:
        """Apply a commit: regular files carry their bytes, LFS files the digest of an upload."""
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                self.repos[repo_id][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "deletedFile":
                del self.repos[repo_id][value["path"]]
            elif operation["key"] == "lfsFile":
                data = self.lfs[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
                self.repos[repo_id][value["path"]] = data
