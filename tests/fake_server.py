"""A vLLM server on localhost, as far as it is asked what it serves and told to empty its caches."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer


@contextmanager
def answering(status: int, *, resets=None, posts=None, **model_config):
    """A server whose /server_info gives `model_config`, as vLLM nests it.

    Args:
        status: of what it answers.
        resets: a list of whether it empties its prefix cache, for each time it is asked to; the last again and again.
        posts: gets the paths that are posted to.
        model_config: what it tells.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            if posts is not None:
                posts.append(self.path)
            self.send_response(status)
            self.end_headers()
            if self.path.startswith("/reset_prefix_cache"):
                success = resets is None or (resets.pop(0) if len(resets) > 1 else resets[0])
                self.wfile.write(json.dumps({"success": success}).encode())

        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps({"vllm_config": {"model_config": model_config}}).encode())

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
