"""Official rules, checked against the numbers in the sources."""

import math

import pytest
import torch

from tidetable.schedules.families import FAMILIES, family_of, official_shift
from tidetable.schedules.process import VP, Flow


@pytest.mark.parametrize(
    ("family", "width", "height", "shift"),
    [
        ("flux", 1024, 1024, 3.158),
        ("flux", 256, 256, math.exp(0.5)),
        ("flux", 1664, 928, 4.383),
        ("flux_schnell", 1024, 1024, 1.0),
        ("qwen_image", 1664, 928, 2.2059),
        ("qwen_image", 1024, 1024, 2.001),
        ("qwen_image", 1472, 1140, 2.262),
        ("qwen_image", 1328, 1328, 2.303),
        ("qwen_image", 2048, 2048, 3.717),
        ("sd3", 512, 2048, 3.0),
        ("auraflow", 1024, 1024, 1.73),
        ("z_image", 1024, 1024, 3.0),
        ("lumina2", 1024, 1024, 6.0),
        ("wan", 832, 480, 3.0),
        ("wan", 480, 832, 3.0),
        ("wan", 1280, 720, 5.0),
        ("tidetable_tiny", 256, 256, 1.0),
    ],
)
def test_official_numbers(family, width, height, shift):
    got, mu = official_shift(family, width, height)
    assert got == pytest.approx(shift, abs=6e-4)
    assert mu == pytest.approx(math.log(got), abs=1e-14)


def test_families_are_consistent():
    names = [name for family in FAMILIES.values() for name in family.model_classes]
    assert len(names) == len(set(names)), "a class must belong to one family"
    for key, family in FAMILIES.items():
        assert family.key == key and family.title and family.source
        assert (family.rule is None) == (family.process == "vp")
        assert all(family_of(name) is family for name in family.model_classes)
        if family.rule is not None:
            assert official_shift(family, family.default_width, family.default_height)[0] >= 1.0
    assert family_of("Nonsense") is None


def test_the_shift_moves_a_quantile_as_published():
    # With shift s the median of uniform time becomes s/(1 + s): .750 for SD3's 3.
    shift, mu = official_shift("sd3", 1024, 1024)
    assert float(torch.sigmoid(torch.tensor(mu, dtype=torch.float64))) == pytest.approx(0.75)
    assert float(Flow().t_from_ratio(shift * Flow().ratio(0.5))) == pytest.approx(0.75)


def test_a_family_without_shift_says_so():
    with pytest.raises(ValueError, match="Stable Diffusion XL .*no shift"):
        official_shift("sdxl", 1024, 1024)
    with pytest.raises(ValueError, match="unknown family 'sdx'.*flux.*sd15"):
        official_shift("sdx", 1024, 1024)
    with pytest.raises(ValueError, match="8×1024"):
        official_shift("flux", 8, 1024)


def test_vp_families_have_stable_diffusions_table():
    assert {key for key, family in FAMILIES.items() if family.process == "vp"} == {"sdxl", "sd15"}
    # SDXL's terminal SNR as published: 0.00468.
    assert math.exp(float(VP.from_betas().log_snr(1.0))) == pytest.approx(0.00468, abs=1e-5)
