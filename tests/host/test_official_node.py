"""Official Schedule as a node, in use on a real model."""

import comfy.sample
import comfy.samplers
import pytest
import torch

from tidetable.nodes.official import OfficialSchedule
from tidetable.runtime.model_sampling import patch_flow_shift
from tidetable.runtime.official import SCHEDULED_FAMILIES, make_official_schedule
from tidetable.runtime.schedules import make_schedule
from tidetable.runtime.tiny import build_patcher
from tidetable.runtime.tiny_text import CONTEXT_WIDTH
from tidetable.schedules.families import FAMILIES, official_shift
from tidetable.schedules.official import official_sigmas
from tidetable.tests.host.model_zoo import FLOW, zoo
from tidetable.tests.test_architecture import ROOT


SIZE = (1664, 928)


@pytest.mark.parametrize("key", SCHEDULED_FAMILIES)
def test_the_node_gives_the_schedule_as_samplers_take_it(key):
    sigmas = OfficialSchedule.execute(key, 12, *SIZE, 1, 1.0, False, "as published").args[0]
    assert sigmas.dtype == torch.float32 and sigmas.device.type == "cpu" and sigmas.shape == (13,)
    torch.testing.assert_close(sigmas, official_sigmas(FAMILIES[key], 12, *SIZE).float(), rtol=0, atol=0)
    assert bool((sigmas[1:] < sigmas[:-1]).all()) and float(sigmas[-1]) == 0.0


@pytest.mark.parametrize("name", [name for name in FLOW if name != "qwen_image"])
def test_equal_to_flow_shift_and_schedule_where_the_pipeline_does_no_more(name):
    """Shift set by Flow Shift, then trailing steps: the same sigmas, but for a terminal and for shifting twice."""
    patched = patch_flow_shift(zoo(name), "official", 1.0, 0.0, *SIZE)[0]
    ours = OfficialSchedule.execute(name, 20, *SIZE, 1, 1.0, True, "as published").args[0]
    torch.testing.assert_close(ours, make_schedule(patched, "trailing", 20, 1.0), rtol=0, atol=1e-6)


def test_sampling_with_it_is_sampling_with_the_shifted_model():
    shift = official_shift("flux", *SIZE)[0]
    model = build_patcher("mmdit-flow")
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 4, CONTEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    cond = [[text, {"pooled_output": text.mean(1)}]]
    latent = torch.zeros(1, 3, 8, 8)

    def sample(model, sigmas):
        sampler = comfy.samplers.sampler_object("euler")
        return comfy.sample.sample_custom(model, noise, 1.0, sampler, sigmas, cond, cond, latent, seed=0)

    with torch.inference_mode():
        official = sample(model, make_official_schedule("flux", 6, *SIZE, 1, 1.0, False, "as published"))
        shifted = patch_flow_shift(model, "shift", shift, 0.0, 64, 64)[0]
        by_model = sample(shifted, make_schedule(shifted, "trailing", 6, 1.0))
    torch.testing.assert_close(official, by_model, rtol=1e-5, atol=1e-5)


def test_bad_input_is_named():
    good = {"family": "flux", "steps": 20, "width": 512, "height": 512, "length": 1, "denoise": 1.0}
    good |= {"shift_once": False, "respacing": "as published"}
    for changed, message in (
        ({"family": "flux9"}, "unknown family 'flux9'"),
        ({"family": "stable_audio_3"}, "Stable Audio 3.*Tidetable_Schedule"),
        ({"steps": 0}, "steps must be 1 to 10000, got 0"),
        ({"width": 0}, "0×512"),
        ({"respacing": "cosine"}, "unknown re-spacing 'cosine'"),
        ({"denoise": -1.0}, "denoise .*-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            OfficialSchedule.execute(**(good | changed))


def test_the_help_page_lists_every_family_with_its_number():
    """| `key` | title | rule | shift at the default size | source |"""
    text = (ROOT / "web" / "docs" / "Tidetable_FlowShift.md").read_text(encoding="utf-8")
    text = text.split("## Official rules")[1]
    rows = dict(line.split("`", 2)[1:] for line in text.splitlines() if line.startswith("| `") and line.count("|") == 6)
    flow = {key: family for key, family in FAMILIES.items() if family.rule is not None}
    assert list(rows) == list(flow)
    for key, family in flow.items():
        shift = official_shift(family, family.default_width, family.default_height, family.default_length)[0]
        assert f"| {shift:.4g} at {family.default_width}×{family.default_height}" in rows[key]
        assert family.title in rows[key]
