"""Start ComfyUI's main.py in this process, as `python main.py` would:  python devtools/launch.py COMFYUI_DIR OPTIONS…

Two things are added: `import torchvision` is made to work on a CPU build of torch (see loading.py), and with
TIDETABLE_WATCH_PARENT set the server ends when the process that started it does.
"""

import os
import runpy
import sys
import threading
import time


def _end_with_parent() -> None:
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [here, *(entry for entry in sys.path if os.path.abspath(entry) != here)]
    import loading  # the file beside this one, before ComfyUI's names are reachable

    del sys.modules["loading"]
    loading.tolerate_torchvision()
    if os.environ.pop("TIDETABLE_WATCH_PARENT", None) and os.name == "posix":
        _end_with_parent()
    comfyui = os.path.abspath(sys.argv[1])
    script = os.path.join(comfyui, "main.py")
    sys.path[0] = comfyui
    sys.argv = [script, *sys.argv[2:]]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
