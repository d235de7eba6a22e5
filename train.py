"""Train what Export Job wrote, without the page: on this machine, on all its GPUs, or on several machines.

    python train.py job.toml                                     one process
    torchrun --nproc-per-node 8 train.py job.toml                one process for each GPU
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        --max-restarts 3 train.py job.toml

ComfyUI is found two folders up, where the pack is installed, or where the environment variable COMFYUI_PATH says. Needs
Python 3.11. The number of processes changes nothing but the speed; docs/scaling.md says how much to expect.
"""

import argparse
import asyncio
import importlib
import logging
import os
import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument(
        "--base-directory", type=Path, help="ComfyUI's folder of models, input and output, if elsewhere"
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    options = parser.parse_args()
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    if not options.job.is_file():
        sys.exit(f"there is no job file {options.job}: write one with the node Export Job")
    own_gpu()
    start_comfyui(comfyui_folder(), options.base_directory, options.cpu)
    importlib.import_module(f"{package()}.runtime.job").run_file(options.job)


def comfyui_folder() -> Path:
    folder = Path(os.environ.get("COMFYUI_PATH") or HERE.parent.parent).resolve()
    if not (folder / "comfy" / "cli_args.py").is_file():
        sys.exit(f"{folder} is not ComfyUI: set COMFYUI_PATH to the folder with its main.py")
    return folder


def own_gpu() -> None:
    """Let each process of a machine see one GPU only: ComfyUI then takes that one."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(number) for number in range(int(rank) + 1)]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(rank) % len(devices)]


def start_comfyui(folder: Path, base_directory: Path | None, cpu: bool) -> None:
    """ComfyUI's nodes and this pack, in this process; nothing listens."""
    # Python puts this file's folder first, where our `nodes` would hide ComfyUI's nodes.py.
    sys.path[:] = [str(folder), *(entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != HERE)]
    sys.argv = sys.argv[:1]
    import torch
    from comfy.cli_args import args

    args.cpu = cpu or not torch.cuda.is_available()
    args.front_end_root = str(folder)
    if base_directory is not None:
        args.base_directory = str(base_directory.resolve())
    importlib.import_module("utils")  # as main.py does, before ComfyUI's comfy/ folder, which has a utils.py, is there
    import folder_paths
    import nodes
    import server
    from utils.extra_config import load_extra_path_config

    extra = folder / "extra_model_paths.yaml"
    if extra.is_file():
        load_extra_path_config(str(extra))
    folder_paths.add_model_folder_path("loras", str(Path(folder_paths.get_output_directory(), "loras")))
    loop = asyncio.new_event_loop()
    server.PromptServer(loop)
    loop.run_until_complete(nodes.init_builtin_extra_nodes())
    if not loop.run_until_complete(nodes.load_custom_node(str(HERE))):
        sys.exit("ComfyUI could not load Tidetable; its reason is above")


def package() -> str:
    """The name under which ComfyUI loaded this folder."""
    return str(HERE).replace(".", "_x_")


if __name__ == "__main__":
    main()
