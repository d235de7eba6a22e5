"""A training run in a process of its own, for a test that kills it: `training_child.py BASE STEPS`."""

import sys

from tidetable.tests.host.training_runs import CONFIG_OF_CHILD, LORA, dataset, quick_run


def main() -> None:
    import folder_paths
    import torch

    folder_paths.set_output_directory(sys.argv[1])
    from tidetable.runtime.tiny import load_tiny_model
    from tidetable.runtime.training import train_lora

    with torch.inference_mode():
        train_lora(load_tiny_model("unet-v"), dataset(), CONFIG_OF_CHILD, LORA, run=quick_run())


if __name__ == "__main__":
    main()
