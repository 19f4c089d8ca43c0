"""The fake hub, and code that talks to it, each time in a process of its own that begins where the imports have ended.

huggingface_hub reads its settings when it is imported, so such code cannot run in the process of the tests. One process
imports everything once, with these settings, and each run is a fork of it.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fake_hub import FakeHub


class OnlineHub(FakeHub):
    """``with OnlineHub() as hub: hub.run(code)``"""

    def __enter__(self) -> "OnlineHub":
        super().__enter__()
        self._home = Path(tempfile.mkdtemp())
        environment = {
            **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self._home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_) -> None:
        self._process.communicate()  # which closes its stdin
        shutil.rmtree(self._home)
        super().__exit__()

    def forget(self) -> None:
        """All that was ever sent, here and in the caches of those that sent it."""
        for kept in (self.repos, self.lfs, self.requests, self.commits, self.trouble):
            kept.clear()
        for path in self._home.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def run(self, code: str, *arguments: object, token: str = "hf_test", fails: bool = False) -> str:
        """What Python prints that runs `code`; of one that is to fail, the errors."""
        with tempfile.TemporaryDirectory() as folder:
            call = {"code": code, "arguments": [*map(str, arguments)], "token": token, "folder": folder}
            assert self._process.stdin and self._process.stdout
            print(json.dumps(call), file=self._process.stdin, flush=True)
            failed = self._process.stdout.readline() != "0\n"
            output, errors = ((Path(folder) / name).read_text() for name in ("output", "errors"))
        assert failed == fails, errors[-3000:]
        return errors if fails else output


def wait_for_call() -> dict:
    """Returns in a fork for each line that comes, with what is printed there going into files."""
    for line in sys.stdin:
        call = json.loads(line)
        pid = os.fork()
        if pid == 0:
            for number, name in ((1, "output"), (2, "errors")):
                os.dup2(os.open(f"{call['folder']}/{name}", os.O_WRONLY | os.O_CREAT), number)
            return call
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


if __name__ == "__main__":
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401

    import hf_nvfp4_qat.cli  # noqa: F401

    call = wait_for_call()
    sys.argv = ["-c", *call["arguments"]]
    os.environ["HF_TOKEN"] = call["token"]
    exec(compile(call["code"], "<online>", "exec"), {"__name__": "__main__"})
