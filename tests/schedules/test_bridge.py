"""The bridge between noise processes: another time and scale, the same sample."""

import math
from itertools import pairwise

import pytest
import torch

from tidetable.schedules.bridge import Bridge
from tidetable.schedules.prediction import target
from tidetable.schedules.process import VE, VP, Flow


SD = VP.from_betas()
NATIVE = {"vp": SD, "vp-zero-terminal": SD.zero_terminal(), "ve": VE(0.01, 200.0)}
KINDS = ["eps", "x0", "v", "velocity", "score"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A smooth function of sample and time that no bridge could know; most of it is noise, as a trained one's is."""
    return sample + 0.3 * torch.tanh(2.0 * sample.roll(1, -1)) * torch.sin(7.0 * t)


def euler_in_sigma(x: torch.Tensor, ratios: list[float], process: VP) -> torch.Tensor:
    """Euler of an eps model as ComfyUI and k-diffusion write it: x = x0 + sigma·noise, network input x/sqrt(1 + σ²)."""
    for sigma, after in pairwise(ratios):
        eps = network(x / math.sqrt(1.0 + sigma**2), process.t_from_ratio(sigma))
        x = x + (after - sigma) * eps
    return x


def euler_in_flow(x: torch.Tensor, times: list[float], bridge: Bridge) -> torch.Tensor:
    for t, after in pairwise(times):
        x = x + (after - t) * bridge.predict(network, "eps", x, t)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [4, 30])
def test_euler_in_flow_time_is_euler_in_sigma(dtype, steps):
    """The law. The network's time is never rounded to rows here, so both may visit any noise level."""
    ratios = torch.linspace(math.log(14.6), math.log(0.03), steps + 1, dtype=torch.float64).exp()
    times = (ratios / (1.0 + ratios)).tolist()
    start = (noise(3, 4, 8) * 14.6).to(dtype)
    straight = euler_in_sigma(start, ratios.tolist(), SD)
    bridged = euler_in_flow(start * (1.0 - times[0]), times, Bridge(SD))
    assert bridged.dtype == dtype
    tolerance = 4e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(bridged / (1.0 - times[-1]), straight, rtol=0, atol=tolerance)


@pytest.mark.parametrize("native", NATIVE.values(), ids=NATIVE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_network_of_one_process_is_perfect_on_another(native, kind):
    bridge = Bridge(native)
    low, high = bridge.range
    t = torch.linspace(low + 1e-3, high - 1e-3, 5, dtype=torch.float64)
    x0, eps = noise(5, 3, 5), noise(5, 3, 5, seed=1)

    def perfect(sample, native_t):
        # It sees what it was trained on: the native mixture of the same x0 and eps.
        torch.testing.assert_close(sample, native.mix(x0, eps, native_t), rtol=1e-9, atol=1e-9)
        return target(kind, x0, eps, native_t, native)

    x_t = Flow().mix(x0, eps, t)
    for dest in KINDS:
        wanted = target(dest, x0, eps, t, Flow())
        torch.testing.assert_close(bridge.predict(perfect, kind, x_t, t, dest), wanted, rtol=1e-7, atol=1e-7)


def test_the_formulas_of_an_eps_model():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    column = t.view(-1, 1)
    x_t = noise(3, 6)
    bridge, seen = Bridge(SD), {}

    def remember(sample, native_t):
        seen.update(sample=sample, row=native_t * 999)
        return network(sample, native_t.view(-1, 1))

    velocity = bridge.predict(remember, "eps", x_t, t)
    torch.testing.assert_close(seen["sample"], x_t / torch.sqrt(column**2 + (1 - column) ** 2))
    # Rows of equal SNR, and not 1000·t: reference values by interpolating SDXL's own table.
    torch.testing.assert_close(seen["row"], torch.tensor([13.0, 354.0, 914.0], dtype=torch.float64), rtol=0, atol=0.7)
    eps = network(seen["sample"], bridge.native_time(t).view(-1, 1))
    denoised = (x_t - column * eps) / (1 - column)
    torch.testing.assert_close(velocity, (x_t - denoised) / column)


def test_range_is_that_of_the_table():
    assert Bridge(SD).range == pytest.approx((0.02834, 0.93596), abs=1e-5)
    assert Bridge(SD.zero_terminal()).range[1] == 1.0
    assert Bridge(Flow()).range == (0.0, 1.0)


@pytest.mark.parametrize("process", [*NATIVE.values(), Flow()], ids=[*NATIVE, "flow"])
def test_a_bridge_to_itself_changes_nothing(process):
    t = torch.tensor([0.2, 0.8], dtype=torch.float64)
    x = noise(2, 7)
    bridge = Bridge(process, process)
    torch.testing.assert_close(bridge.native_time(t), t, rtol=0, atol=1e-9)
    torch.testing.assert_close(bridge.native_sample(x, t), x, rtol=1e-9, atol=0)


@pytest.mark.parametrize("t", [0.01, 0.95, 1.0, math.nan, [0.5, 0.97]])
def test_a_level_that_the_network_never_saw_is_refused(t):
    wrong = "nan" if t != t else f"{t[1] if isinstance(t, list) else t:g}"
    with pytest.raises(ValueError, match=rf"t = {wrong} has no equal.*0\.0283.*0\.9359.*clamp"):
        Bridge(SD).native_time(torch.tensor(t, dtype=torch.float64))
    Bridge(SD).native_time(torch.tensor(Bridge(SD).range))  # its ends survive float32
