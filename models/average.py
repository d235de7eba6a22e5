"""Mean of the weights of runs that went on from each other: `python3 dev.py exec models/average.py OUT IN IN …`.

Averages of such runs are better than either (Wortsman et al. 2022, arXiv:2203.05482).
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    weights, records = [load_file(path) for path in args.runs], []
    for path in args.runs:
        with safe_open(path, "pt") as file:
            records.append(file.metadata())
    mean = {key: torch.stack([run[key].float() for run in weights]).mean(0).half() for key in weights[0]}
    licence = {key: value for key, value in records[-1].items() if key.startswith("modelspec.")}
    save_file(mean, args.out, metadata={"average_of": json.dumps(records), **licence})


if __name__ == "__main__":
    main()
