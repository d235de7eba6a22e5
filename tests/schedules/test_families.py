"""Official rules, checked against the numbers in the sources."""

import math

import pytest
import torch

from tidetable.schedules.families import FAMILIES, NOT_FAMILIES, family_named, family_of, official_shift
from tidetable.schedules.process import VP, Flow
from tidetable.schedules.shift import empirical_mu, log_area_mu
from tidetable.schedules.shift_modes import SHIFT_MODES, ShiftChoice, chosen_shift


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
        ("chroma", 1024, 1024, 3.158),
        ("chroma_radiance", 1024, 1024, 3.158),
        ("longcat_image", 512, 2048, 3.158),
        ("boogu", 512, 512, 3.158),
        ("lens", 1024, 1024, 6.2277),
        ("krea2", 1024, 1024, 2.475),
        ("cogview4", 1024, 1024, 3.25),
        ("glm_image", 1024, 1024, 3.25),
        ("ideogram4", 1024, 1024, 2.0),
        ("ideogram4", 512, 512, 1.0),
        ("omnigen2", 1024, 1024, 3.2),
        ("hidream", 1024, 1024, 3.0),
        ("hunyuan_image", 2048, 2048, 5.0),
        ("hunyuan_video", 1280, 720, 7.0),
        ("hunyuan_video_15", 848, 480, 5.0),
        ("hunyuan_video_15", 1280, 720, 9.0),
        ("wan22_5b", 832, 480, 5.0),
        ("wan_vace", 832, 480, 16.0),
        ("wan_s2v", 832, 480, 3.0),
        ("kandinsky5", 768, 512, 10.0),
        ("kandinsky5_image", 1024, 1024, 3.0),
        ("anima", 1024, 1024, 3.0),
        ("joyimage", 1024, 1024, 1.5),
        ("minimax_h3", 1280, 720, 12.0),
    ],
)
def test_official_numbers(family, width, height, shift):
    got, mu = official_shift(family, width, height)
    assert got == pytest.approx(shift, abs=6e-4)
    assert mu == pytest.approx(math.log(got), abs=1e-14)


@pytest.mark.parametrize(
    ("width", "height", "length", "mu", "shift"),
    [(768, 512, 97, 2.371, 10.7), (1216, 704, 121, 5.373, 215.5), (1920, 1088, 121, 12.271, 213_500)],
)
def test_ltx_counts_frames_and_is_not_clamped(width, height, length, mu, shift):
    got = official_shift("ltxv", width, height, length)
    assert got[1] == pytest.approx(mu, abs=5e-4) and got[0] == pytest.approx(shift, rel=2e-3)
    assert got == official_shift("ltx2", width, height, length)


def test_tokens_of_videos_are_whole_latent_frames():
    assert FAMILIES["wan"].tokens(832, 480, 81) == 52 * 30 * 21
    assert FAMILIES["ltxv"].tokens(768, 512, 97) == 24 * 16 * 13
    assert FAMILIES["mochi"].tokens(848, 480, 163) == 53 * 30 * 28
    assert FAMILIES["flux"].tokens(1024, 1024) == 4096
    assert FAMILIES["flux"].tokens(1024, 1024, 81) == FAMILIES["qwen_image"].tokens(1024, 1024, 81) == 4096
    assert FAMILIES["wan"].tokens(832, 480, 84) == FAMILIES["wan"].tokens(832, 480, 81)


@pytest.mark.parametrize("steps", [1, 10, 50, 200, 10_000])
def test_flux2_depends_on_steps_up_to_4300_tokens_and_then_jumps(steps):
    shift, mu = official_shift("flux2", 1024, 1024, steps=steps)
    assert mu == pytest.approx(empirical_mu(4096, steps)) and shift == pytest.approx(math.exp(mu))
    # Its second line is FLUX.1's, which it follows at 200 steps and, at any number of steps, above 4300 tokens.
    assert empirical_mu(4096, 200) == pytest.approx(official_shift("flux", 1024, 1024)[1], abs=1e-4)
    assert empirical_mu(4301, steps) == pytest.approx(0.00016927 * 4301 + 0.45666666)


def test_flux2_as_measured():
    assert math.exp(empirical_mu(4300, 50)) == pytest.approx(7.73, abs=5e-3)
    assert math.exp(empirical_mu(4301, 50)) == pytest.approx(3.27, abs=5e-3)
    assert empirical_mu(4096, 50) == pytest.approx(2.02, abs=5e-3)  # what ComfyUI has at every size


def test_the_training_rule_differs_where_the_authors_said_so():
    assert official_shift("flux2", 1024, 1024, training=True) == official_shift("flux", 1024, 1024)
    assert official_shift("omnigen2", 1024, 1024, training=True)[1] == pytest.approx(1.15)
    for key, family in FAMILIES.items():
        if family.rule is not None and family.training is None:
            assert official_shift(key, 768, 512, 49, training=True) == official_shift(key, 768, 512, 49)


def test_families_are_consistent():
    names = [name for family in FAMILIES.values() for name in family.model_classes] + list(NOT_FAMILIES)
    assert len(names) == len(set(names)), "a class must belong to one family"
    for key, family in FAMILIES.items():
        assert family.key == key and family.title and family.source
        assert (family.rule is not None) == (family.process == "flow") == (family.prediction == "velocity")
        assert all(family_of(name) is family for name in family.model_classes)
        assert family.pixels_per_token % family.pixels_per_latent == 0
        if family.rule is not None:
            size = (family.default_width, family.default_height, family.default_length)
            assert official_shift(family, *size)[0] >= 1.0
    assert family_of("Nonsense") is None and family_of("SAM3") is None


# ── modes ───────────────────────────────────────────────────────────────────────────────────────────


def test_line_is_the_official_line_where_its_points_are():
    for family in ("flux", "qwen_image", "krea2", "ltxv"):
        line = FAMILIES[family].rule.line
        choice = ShiftChoice("line", width=1664, height=928, length=49, line=line)
        assert chosen_shift(choice, FAMILIES[family]) == official_shift(family, 1664, 928, 49)


@pytest.mark.parametrize(("width", "height"), [(512, 512), (1024, 1024), (1664, 928), (2048, 1024)])
def test_area_modes_are_one_at_the_base_and_log_area_is_the_square_of_sqrt_area(width, height):
    for base in (256, 512, 1024):
        root = chosen_shift(ShiftChoice("sqrt area", width=width, height=height, base_size=base))
        ratio = chosen_shift(ShiftChoice("log area", width=width, height=height, base_size=base))
        assert root[0] ** 2 == pytest.approx(ratio[0]) and 2 * root[1] == pytest.approx(ratio[1])
        assert ratio[0] == pytest.approx(width * height / base**2)
        assert chosen_shift(ShiftChoice("sqrt area", width=base, height=base, base_size=base)) == (1.0, 0.0)


def test_sqrt_area_is_the_rule_of_ideogram_and_log_area_the_articles():
    at = {"width": 1664, "height": 928}
    assert chosen_shift(ShiftChoice("sqrt area", base_size=512, **at)) == pytest.approx(
        official_shift("ideogram4", 1664, 928)
    )
    assert chosen_shift(ShiftChoice("log area", **at))[1] == log_area_mu(1664, 928) == pytest.approx(0.38707, abs=5e-6)
    # The article's 2.205 is not the number that its formula gives, but the one of Qwen-Image's line in tokens.
    assert chosen_shift(ShiftChoice("official", **at), FAMILIES["qwen_image"])[0] == pytest.approx(2.2059, abs=5e-5)


def test_sqrt_area_counts_the_frames_of_a_video():
    choice = ShiftChoice("sqrt area", width=512, height=512, length=13, base_size=512)
    assert chosen_shift(choice, FAMILIES["wan"])[0] == pytest.approx(2.0)  # 4 latent frames


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": "cosine"}, "unknown mode 'cosine'.*sqrt area"),
        ({"mode": "shift", "shift": 0.0}, "shift must be .*0.0"),
        ({"mode": "shift", "shift": -1.0}, "shift must be .*-1.0"),
        ({"mode": "shift", "shift": 1e9}, "shift must be 1e-06 to 1e[+]06, got 1e[+]09 from mode shift:.*1 to 16"),
        ({"mode": "shift", "shift": 1e-9}, "got 1e-09 from mode shift"),
        ({"mode": "mu", "mu": 20.0}, "got 4.85165e[+]08 from mode mu"),
        ({"mode": "line", "width": 16384, "height": 16384}, "from mode line at 16384×16384, 1 frame"),
        ({"mode": "mu", "mu": 1e9}, "mu must be .*1000000000"),
        ({"mode": "line", "width": 0}, "0×1024"),
        ({"mode": "line", "length": 0}, "length .*got 0"),
        ({"mode": "line", "line": type(FAMILIES["flux"].rule.line)(256, 0.5, 256, 0.9)}, "both 256 tokens"),
        ({"mode": "line", "line": type(FAMILIES["flux"].rule.line)(0, 0, 1, 1e6)}, "mu must be"),
        ({"mode": "sqrt area", "height": 8}, "1024×8"),
        ({"mode": "sqrt area", "base_size": 0}, "base_size .*got 0"),
        ({"mode": "log area", "base_size": -5}, "base_size .*got -5"),
        ({"mode": "log area", "width": 0}, "0×1024"),
        ({"mode": "official", "width": 0}, "0×1024"),
    ],
)
def test_bad_choices_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        chosen_shift(ShiftChoice(**changed), FAMILIES["flux"])


def test_flux2_refuses_steps_out_of_range():
    for steps in (0, -1, 10_001):
        with pytest.raises(ValueError, match=f"steps must be 1 to 10000, got {steps}"):
            official_shift("flux2", 1024, 1024, steps=steps)


def test_every_mode_gives_a_shift_and_its_logarithm():
    for mode in SHIFT_MODES:
        shift, mu = chosen_shift(ShiftChoice(mode, width=1328, height=800), FAMILIES["qwen_image"])
        assert mu == pytest.approx(math.log(shift), abs=1e-12)


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
    with pytest.raises(ValueError, match="unknown family 'xxx"):
        family_named("x" * 10_000)
    with pytest.raises(ValueError, match="8×1024"):
        official_shift("flux", 8, 1024)


def test_vp_families_have_stable_diffusions_table():
    # SDXL's terminal SNR as published: 0.00468.
    assert math.exp(float(VP.from_betas().log_snr(1.0))) == pytest.approx(0.00468, abs=1e-5)
