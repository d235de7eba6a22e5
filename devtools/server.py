"""Start and stop a real ComfyUI server with the pack linked into it, on the loopback interface."""

import atexit
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from . import loading
from .errors import DevError


LAUNCHER = Path(__file__).resolve().parent / "launch.py"
PACK_FOLDER = "ComfyUI-Tidetable"
HOST = "127.0.0.1"


class Server:
    """A ComfyUI server process.

        with Server() as server:
            Client(server.base_url).run(prompt)

    It serves `base_directory` (None: a temporary folder, removed at the end) with its own models, input, output and
    user folders, and the pack linked into its custom_nodes. `port` None takes a free one. `options` go to ComfyUI's
    main.py as they are. The process ends with this one, also when this one is killed.
    """

    def __init__(self, base_directory: str | os.PathLike | None = None, *, port: int | None = None, options=()):
        path = loading.comfyui_path()
        if path is None:
            raise DevError("COMFYUI_PATH is not set: run this through `python3 dev.py`.")
        self.comfyui = path
        self._is_temporary = base_directory is None
        self.base_directory = Path(base_directory or tempfile.mkdtemp(prefix="tidetable-comfyui-")).absolute()
        self.log_path = self.base_directory / "server.log"
        self._asked_port = port
        self.port = 0
        self.options = tuple(options)
        self._process: subprocess.Popen | None = None

    @property
    def base_url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def output_directory(self) -> Path:
        return self.base_directory / "output"

    @property
    def input_directory(self) -> Path:
        return self.base_directory / "input"

    def start(self, timeout: float = 300.0) -> "Server":
        """Start and wait until it answers, at most `timeout` seconds. Else DevError with the end of its log."""
        self._make_base()
        atexit.register(self.stop)
        attempts = 1 if self._asked_port else 3
        for attempt in range(attempts):
            self.port = self._asked_port or free_port()
            require_free(self.port)
            self._launch()
            try:
                self._wait_until_ready(timeout)
                return self
            except DevError:
                self._end_process()
                # Between choosing a free port and ComfyUI's binding it, another program may have taken it.
                if attempt + 1 == attempts or "address already in use" not in self.log_text().lower():
                    self.stop()
                    raise
            except BaseException:
                self.stop()
                raise
        raise AssertionError("unreachable")

    def stop(self) -> None:
        """End the server and remove its temporary folder. Safe to call twice."""
        self._end_process()
        atexit.unregister(self.stop)
        if self._is_temporary:
            # The link first and by name: what it points to is the checkout.
            _unlink_folder(self.base_directory / "custom_nodes" / PACK_FOLDER)
            shutil.rmtree(self.base_directory, ignore_errors=True)

    def __enter__(self) -> "Server":
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self) -> int:
        """Wait until the server ends by itself; returns its exit status."""
        assert self._process is not None, "not started"
        return self._process.wait()

    def log_text(self) -> str:
        """All that the server has printed so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    # ── inside ──────────────────────────────────────────────────────────────────────────────────────

    def _make_base(self) -> None:
        for name in loading.HOST_FOLDERS:
            (self.base_directory / name).mkdir(parents=True, exist_ok=True)
        link_pack(self.base_directory / "custom_nodes")

    def _command(self) -> list[str]:
        known = (self.comfyui / "comfy" / "cli_args.py").read_text()
        # In this order of arguments, a caller's option wins over ours.
        options = ["--listen", HOST, "--port", str(self.port), "--base-directory", str(self.base_directory)]
        database = self.base_directory / "user" / "comfyui.db"
        if '"--database-url"' in known:
            options += ["--database-url", f"sqlite:///{database}"]
        if '"--disable-api-nodes"' in known:
            options += ["--disable-api-nodes"]
        if not has_cuda():
            options += ["--cpu"]
        return [sys.executable, str(LAUNCHER), str(self.comfyui), *options, *self.options]

    def _launch(self) -> None:
        variables = dict(os.environ, TIDETABLE_WATCH_PARENT="1", PYTHONUNBUFFERED="1")
        with self.log_path.open("w") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.comfyui,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process, which then stops the server in order
            )

    def _wait_until_ready(self, timeout: float) -> None:
        assert self._process is not None
        # Only its own answer counts, and no proxy stands between us and the loopback interface.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                status = self._process.returncode
                raise DevError(f"ComfyUI ended with status {status} while starting.\n{self._log_end()}")
            try:
                with opener.open(self.base_url + "/system_stats", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise DevError(f"ComfyUI did not answer within {timeout:.0f} s.\n{self._log_end()}")

    def _log_end(self, lines: int = 20) -> str:
        kept = self.base_directory
        if self._is_temporary:
            # Outlives the temporary folder, so that the message below names a file that is there.
            kept = loading.ROOT / ".dev"
            kept.mkdir(exist_ok=True)
            shutil.copyfile(self.log_path, kept / "server.log")
        end = "\n".join("  | " + line for line in self.log_text().splitlines()[-lines:])
        return f"The end of its log ({kept / 'server.log'}):\n{end}"

    def _end_process(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None


# ── helpers ────────────────────────────────────────────────────────────────────────────────────────


def has_cuda() -> bool:
    """Whether the torch of this process can use a CUDA device."""
    import torch

    return torch.cuda.is_available()


def free_port() -> int:
    """A port on the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def require_free(port: int) -> None:
    """Raise DevError when `port` cannot be listened on."""
    with socket.socket() as probe:
        if os.name == "posix":
            # As asyncio does: closed connections that linger are not in the way.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except (OSError, OverflowError) as error:
            raise DevError(
                f"Port {port} on {HOST} cannot be used ({error}): stop the program that listens there, "
                "or choose another port with --port N."
            ) from error


def link_pack(custom_nodes: Path) -> Path:
    """Link this checkout into a custom_nodes folder under the pack's own name; returns the link."""
    link = custom_nodes / PACK_FOLDER
    if link.exists() and link.resolve() == loading.ROOT:
        return link
    if link.exists() and not link.is_symlink():
        raise DevError(f"{link} exists and is not this checkout: move it away.")
    custom_nodes.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    if os.name == "nt":
        import _winapi

        _winapi.CreateJunction(str(loading.ROOT), str(link))  # pyright: ignore[reportAttributeAccessIssue]
    else:
        link.symlink_to(loading.ROOT, target_is_directory=True)
    return link


def _unlink_folder(link: Path) -> None:
    """Remove a link to a folder (a junction on Windows), never what it points to."""
    if link.is_symlink():
        link.unlink()
    elif os.name == "nt" and link.exists():
        os.rmdir(link)
