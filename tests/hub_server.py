"""A Hub in miniature on the loopback address: it takes uploads of the real client and serves them again."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REVISION = "0" * 40


class HubHandler(BaseHTTPRequestHandler):
    """The endpoints that `create_repo`, `upload_folder` and `from_pretrained` call; `server.repositories` holds
    {repository: {path: bytes}}."""

    protocol_version = "HTTP/1.1"

    def answer(self, content, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": REVISION, **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {self.server.token}":
            return self.answer({"error": "Invalid credentials"}, 401, {"X-Error-Message": "Invalid credentials"})
        if self.path == "/api/repos/create":
            name = json.loads(body)["name"]
            repo_id = f"{json.loads(body).get('organization') or 'tester'}/{name}"
            self.server.repositories.setdefault(repo_id, {})
            return self.answer({"url": f"{self.server.url}/{repo_id}", "id": repo_id})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repo_id, action = re.match(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path).groups()
        if action == "preupload":
            paths = [entry["path"] for entry in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            return self.answer({"files": files})
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.server.repositories[repo_id][entry["value"]["path"]] = content
        return self.answer({"commitUrl": f"{self.server.url}/{repo_id}/commit/{REVISION}", "commitOid": REVISION})

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            if self.headers["Authorization"] != f"Bearer {self.server.token}":
                return self.answer({"error": "Invalid credentials"}, 401, {"X-Error-Message": "Invalid credentials"})
            return self.answer({"name": "tester", "type": "user", "orgs": []})
        found = re.match(r"/api/models/([^/]+/[^/?]+)", self.path)
        if found and found[1] in self.server.repositories:
            files = self.server.repositories[found[1]]
            if "/tree/" in self.path:
                tree = [
                    {"type": "file", "path": path, "size": len(content), "oid": "0"} for path, content in files.items()
                ]
                return self.answer(tree)
            siblings = [{"rfilename": path} for path in files]
            return self.answer({"id": found[1], "sha": REVISION, "siblings": siblings, "tags": [], "private": False})
        found = re.match(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)", self.path)
        content = self.server.repositories.get(found[1], {}).get(found[2]) if found else None
        if content is None:
            return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
        return self.answer(content, headers={"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


class HubServer(ThreadingHTTPServer):
    token = "hf_test"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()
