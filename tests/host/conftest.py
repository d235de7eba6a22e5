"""Fixtures of the tests inside real ComfyUI. ComfyUI is imported in them: this file is read before it is found."""

import pytest
import torch


@pytest.fixture
def in_a_node():
    """Inference mode, as ComfyUI's executor runs nodes. A file asks for it: trainers leave it and test that."""
    with torch.inference_mode():
        yield


@pytest.fixture
def output(tmp_path):
    """An output folder for each test."""
    import folder_paths

    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path))
    yield tmp_path
    folder_paths.set_output_directory(before)


@pytest.fixture(scope="module")
def models():
    """A small MODEL of every family, a flux at shift 6 and an sdxl with zero terminal SNR, by name."""
    from tidetable.runtime.model_sampling import patch_flow_shift
    from tidetable.tests.host.model_zoo import ZOO, discrete, zoo

    made = {name: zoo(name) for name in ZOO}
    made["flux-6"] = patch_flow_shift(made["flux"], "shift", 6.0, 0.0, 64, 64)[0]
    made["sdxl-ztsnr"] = discrete(made["sdxl"], "v_prediction", zsnr=True)
    return made


@pytest.fixture(scope="module")
def flow():
    """A MODEL whose network is a perfect one of a Gaussian mixture (mixture_model.py)."""
    from tidetable.tests.host.mixture_model import exact_model

    return exact_model("flow")
