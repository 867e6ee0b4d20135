"""A stand-in of the Hugging Face hub on this machine: what of its API a commit and a download need."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHA = "0" * 40


class Hub(ThreadingHTTPServer):
    """`files` has what was committed, by repository and name; `private` is what each was made as, `writer` who may write."""

    def __init__(self, writer: str = "hf_writer") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.writer = writer
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/").split("/")
        if path[0] == "api":
            repo = "/".join(path[2:4])
            known = {"id": repo, "private": self.server.private.get(repo), "sha": SHA, "siblings": []}
            self.answer(known, 200 if repo in self.server.private else 404)
            return
        repo, name = "/".join(path[:2]), "/".join(path[4:])
        content = self.server.files.get(repo, {}).get(name)
        if content is None:
            self.answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=SHA)
            return
        self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0].strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {self.server.writer}":
            self.answer({"error": "who are you"}, 401)
        elif path[1:] == ["repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked['organization'] or 'me'}/{asked['name']}"
            there = repo in self.server.private
            self.server.private.setdefault(repo, asked.get("visibility") == "private" or bool(asked.get("private")))
            self.answer({"url": f"{self.server.url}/{repo}"}, 409 if there else 200)
        elif path[1:] == ["validate-yaml"]:
            self.answer({"errors": [], "warnings": []})
        elif path[4] == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        else:
            self.commit("/".join(path[2:4]), [json.loads(line) for line in body.splitlines()])

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.files.setdefault(repo, {})
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "header":
                self.server.messages.append(line["value"]["summary"])
        self.answer({"commitUrl": f"{self.server.url}/{repo}/commit/{SHA}", "commitOid": SHA})
