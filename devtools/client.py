"""Talk to a ComfyUI server as its page does: queue a prompt, follow it over the WebSocket, fetch the results."""

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import DevError


Prompt = dict[str, dict[str, Any]]
"""The API format: node id -> {"class_type": …, "inputs": {name: value or [node id, output index]}}."""

OnEvent = Callable[[str, dict[str, Any]], None]
"""Called with type and data of every message about the prompt: ("progress", {"node": "3", "value": 1, "max": 20})."""

_CONNECTION_LOST = "The connection to ComfyUI at {url} was lost: its log says why."


class PromptError(DevError):
    """ComfyUI refused a prompt. `details` holds its answer: {"error": …, "node_errors": {node id: …}}."""

    def __init__(self, details: Mapping[str, Any]):
        self.details = details
        error = details.get("error", details)
        lines = [error.get("message", str(error)) if isinstance(error, dict) else str(error)]
        for node, problem in (details.get("node_errors") or {}).items():
            for one in problem.get("errors", ()):
                lines.append(f"node {node} ({problem.get('class_type')}): {one.get('message')}: {one.get('details')}")
        super().__init__("ComfyUI refused the prompt: " + "; ".join(lines))


class ExecutionError(DevError):
    """A node raised. `node_id`, `node_type`, `exception_type`, `message` and `traceback` say which and how."""

    def __init__(self, data: Mapping[str, Any]):
        self.node_id = str(data.get("node_id"))
        self.node_type = str(data.get("node_type"))
        self.exception_type = str(data.get("exception_type"))
        self.message = str(data.get("exception_message", "")).strip()
        self.traceback = "".join(data.get("traceback") or ())
        super().__init__(f"node {self.node_id} ({self.node_type}) raised {self.exception_type}: {self.message}")


class InterruptedPromptError(DevError):
    """The prompt was cancelled."""


@dataclass
class Result:
    """What a finished prompt left behind."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]
    """Node id -> what the node showed: {"images": [{"filename", "subfolder", "type"}, …], "text": …}."""
    history: dict[str, Any] = field(repr=False)
    seconds: dict[str, float] = field(default_factory=dict)
    """Node id -> how long it ran."""

    def images(self, node_id: str | None = None) -> list[dict[str, str]]:
        """The image references of one node, or of all of them."""
        nodes = [node_id] if node_id is not None else list(self.outputs)
        return [image for node in nodes for image in self.outputs.get(node, {}).get("images", ())]


class Client:
    """One page's worth of connection to the server at `base_url` (http://host:port)."""

    def __init__(self, base_url: str, timeout: float = 30.0):
        self.base_url = base_url.rstrip("/")
        self.timeout = timeout
        self.client_id = uuid.uuid4().hex
        # No proxy stands between us and a server on the loopback interface.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    # ── plain HTTP ──────────────────────────────────────────────────────────────────────────────────

    def request(self, path: str, body: bytes | None = None, content_type: str = "application/json") -> bytes:
        """GET `path`, or POST `body` to it. DevError when the server is away, HTTPError for a status over 299."""
        request = urllib.request.Request(self.base_url + path, data=body, headers={"Content-Type": content_type})
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, OSError) as error:
            raise DevError(f"ComfyUI at {self.base_url} does not answer ({error}): its log says why.") from error

    def get(self, path: str, **query: str) -> Any:
        """GET JSON."""
        return json.loads(self.request(path + ("?" + urllib.parse.urlencode(query) if query else "")))

    def post(self, path: str, data: Any) -> Any:
        """POST JSON; returns the JSON answer, or None for an empty one."""
        answer = self.request(path, json.dumps(data).encode())
        return json.loads(answer) if answer.strip() else None

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The definitions of all nodes (or one), by id."""
        return self.get("/object_info" + (f"/{urllib.parse.quote(node)}" if node else ""))

    def queue(self, prompt: Prompt, workflow: dict[str, Any] | None = None) -> str:
        """Queue a prompt; returns its id. `workflow`: the UI graph to save in the pictures. Raises PromptError."""
        body: dict[str, Any] = {"prompt": prompt, "client_id": self.client_id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        try:
            answer = self.post("/prompt", body)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                details = json.loads(text)
            except ValueError:
                details = {"error": f"status {error.code}: {text[:500]}"}
            raise PromptError(details) from error
        if answer.get("node_errors"):
            # ComfyUI would run the rest and leave the faulty outputs out; half a result helps nobody here.
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            raise PromptError(answer)
        return answer["prompt_id"]

    def interrupt(self) -> None:
        """Cancel what runs now."""
        self.request("/interrupt", b"")

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The record of a finished prompt, or None while it is not finished."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def fetch(self, image: Mapping[str, str]) -> bytes:
        """The bytes of a file that a node saved, named as in `Result.images()`."""
        names = {name: image[name] for name in ("filename", "subfolder", "type") if name in image}
        return self.request("/view?" + urllib.parse.urlencode(names))

    def upload(self, file: Path, subfolder: str = "") -> str:
        """Put an image into the input folder; returns the name that LoadImage takes."""
        boundary = uuid.uuid4().hex
        fields = {"overwrite": "true", "subfolder": subfolder}
        part = f"--{boundary}\r\nContent-Disposition: form-data; name="
        parts = [f'{part}"{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()]
        parts.append(f'{part}"image"; filename="{file.name}"\r\nContent-Type: application/octet-stream\r\n\r\n')
        body = "".join(parts).encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        answer = json.loads(self.request("/upload/image", body, f"multipart/form-data; boundary={boundary}"))
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else answer["name"]

    # ── a whole run ─────────────────────────────────────────────────────────────────────────────────

    def run(
        self,
        prompt: Prompt,
        on_event: OnEvent | None = None,
        timeout: float = 900.0,
        workflow: dict[str, Any] | None = None,
    ) -> Result:
        """Queue a prompt, follow it to its end and return what it left.

        Raises PromptError (refused), ExecutionError (a node raised), InterruptedPromptError (cancelled) or DevError (no
        end within `timeout` seconds, or the server went away).
        """
        return asyncio.run(self._limited(prompt, on_event, workflow, timeout))

    async def _limited(self, prompt: Prompt, on_event: OnEvent | None, workflow, timeout: float) -> Result:
        try:
            return await asyncio.wait_for(self._run(prompt, on_event, workflow), timeout)
        except asyncio.TimeoutError as error:
            raise DevError(f"The prompt did not finish within {timeout:.0f} s.") from error

    async def _run(self, prompt: Prompt, on_event: OnEvent | None, workflow) -> Result:
        import aiohttp

        url = f"ws{self.base_url.removeprefix('http')}/ws?clientId={self.client_id}"
        try:
            async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
                prompt_id = self.queue(prompt, workflow)
                seconds = await _follow(socket, prompt_id, on_event)
        except aiohttp.ClientError as error:
            raise DevError(_CONNECTION_LOST.format(url=self.base_url)) from error
        if seconds is None:
            raise DevError(_CONNECTION_LOST.format(url=self.base_url))
        record = self.history(prompt_id)
        while record is None:  # the last message may be sent a moment before the record is written
            await asyncio.sleep(0.05)
            record = self.history(prompt_id)
        return Result(prompt_id, record["outputs"], record, seconds)


async def _follow(socket, prompt_id: str, on_event: OnEvent | None) -> dict[str, float] | None:
    """Read messages until the prompt ends; node id -> seconds, or None when the connection ends first."""
    import aiohttp

    loop = asyncio.get_running_loop()
    seconds: dict[str, float] = {}
    running, since = None, loop.time()
    async for message in socket:
        if message.type is not aiohttp.WSMsgType.TEXT:
            continue  # binary messages are preview pictures
        event = json.loads(message.data)
        kind, data = event["type"], event.get("data") or {}
        if data.get("prompt_id", prompt_id) != prompt_id:
            continue
        if on_event is not None:
            on_event(kind, data)
        if kind == "executing":
            if running is not None:
                seconds[running] = seconds.get(running, 0.0) + loop.time() - since
            running, since = data.get("node"), loop.time()
        elif kind == "execution_error":
            raise ExecutionError(data)
        elif kind == "execution_interrupted":
            raise InterruptedPromptError("The prompt was cancelled.")
        elif kind == "execution_success":
            if running is not None:
                seconds[running] = seconds.get(running, 0.0) + loop.time() - since
            return seconds
    return None
