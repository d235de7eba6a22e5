"""`python3 dev.py serve`: ComfyUI with the pack in it, for a person. Further arguments go to ComfyUI as they are."""

import argparse
import os
import subprocess
import sys

from devtools import environment, loading, server


SCRATCH = loading.ROOT / ".dev"


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.py serve")
    parser.add_argument("--port", type=int, default=8188)
    own, options = parser.parse_known_args()
    server.require_free(own.port)
    print(f"ComfyUI with Tidetable is starting on http://{server.HOST}:{own.port} (Ctrl-C stops it)", flush=True)
    comfyui = loading.comfyui_path()
    assert comfyui is not None
    command = [sys.executable, str(server.LAUNCHER), str(comfyui), "--listen", server.HOST, "--port", str(own.port)]
    command += [] if server.has_cuda() else ["--cpu"]
    command += [*_folders(comfyui), *options]
    if os.name == "posix":
        os.chdir(comfyui)
        os.execv(command[0], command)
    sys.exit(subprocess.call(command, cwd=comfyui))


def _folders(comfyui) -> list[str]:
    """Options that make ComfyUI see the pack and keep what a person makes, changing nothing in a ComfyUI of theirs."""
    if comfyui == (loading.ROOT / ".comfyui").resolve():
        base = SCRATCH / "serve"
        for name in loading.HOST_FOLDERS:
            (base / name).mkdir(parents=True, exist_ok=True)
        server.link_pack(base / "custom_nodes")
        return ["--base-directory", str(base)]
    found = environment.find()
    inside = comfyui / "custom_nodes"
    if found and any(entry.resolve() == loading.ROOT for entry in inside.iterdir()):
        return []
    # The user's own models, outputs and packs, plus one more folder of packs with only a link to this checkout in it.
    link = server.link_pack(SCRATCH / "custom_nodes")
    paths = SCRATCH / "extra_model_paths.yaml"
    paths.write_text(f"tidetable:\n  custom_nodes: {str(link.parent)!r}\n")
    return ["--extra-model-paths-config", str(paths)]


if __name__ == "__main__":
    main()
