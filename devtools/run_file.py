"""Run a Python file with the checkout importable as `tidetable`, `devtools` as it is, and ComfyUI on the path.

python devtools/run_file.py FILE ARGS…      (dev.py calls it with the Python of the environment)
"""

import runpy
import signal
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    file = Path(sys.argv[1]).resolve()
    sys.argv = [str(file), *sys.argv[2:]]
    # The folder of FILE first, as with `python FILE`, but never our own: its plain names are not for absolute import.
    own = str(Path(__file__).resolve().parent)
    others = [entry for entry in sys.path if entry != own]
    sys.path[:] = [str(ROOT), *([str(file.parent)] if str(file.parent) != own else []), *others]
    from devtools import loading
    from devtools.errors import DevError, as_dev_error

    loading.load_checkout()
    # A polite kill then runs `finally` blocks and exit handlers, which stop the ComfyUI that FILE started.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        loading.prepare_host()
        runpy.run_path(str(file), run_name="__main__")
    except DevError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        known = as_dev_error(error)
        if known is None:
            raise
        sys.exit(f"error: {known}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
