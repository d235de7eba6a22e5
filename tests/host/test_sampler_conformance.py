"""Every sampler name of the running ComfyUI, and every one of ours, against exact ground truth (see conformance.py)."""

import pytest
import torch

from tidetable.runtime.samplers import CORRECTED
from tidetable.samplers import SAMPLERS
from tidetable.tests.host import conformance


pytestmark = pytest.mark.usefixtures("in_a_node")
COUNT = 2048


@pytest.mark.parametrize("name", conformance.cases("sampler-safe"))
def test_every_sampler_name_is_right_through_the_flow_sampler(name):
    plain, guided = conformance.judge("sampler-safe", name, COUNT)
    assert plain.passed, plain
    assert guided is None or guided.passed, guided


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_of_ours_is_right_on_flow(name):
    plain, guided = conformance.judge("tidetable", name, COUNT)
    assert plain.passed, plain
    assert guided is None or guided.passed, guided


@pytest.mark.parametrize("arm", ["tidetable-eps", "tidetable-ztsnr"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_of_ours_is_right_where_there_is_no_flow(name, arm):
    plain, guided = conformance.judge(arm, name, COUNT)
    assert plain.passed, plain
    assert guided is None or guided.passed, guided


@pytest.mark.parametrize("arms", [("eps", "v"), ("tidetable-eps", "tidetable-v")], ids="-".join)
def test_a_v_model_on_the_same_table_draws_what_an_eps_model_draws(arms):
    """For every sampler, noise included: so what is right on eps is right on v."""
    for name in conformance.cases(arms[0]):
        eps, v = (conformance.run(arm, name, 12, 16, seed=3) for arm in arms)
        torch.testing.assert_close(v, eps, rtol=0, atol=2e-3, msg=name)
        assert float(eps.std()) > 0.5, name


@pytest.mark.parametrize("name", CORRECTED)
def test_what_is_corrected_is_wrong_in_stock(name):
    """When ComfyUI repairs one of these, it can be handed through."""
    plain, guided = conformance.judge("stock-flow", name, COUNT)
    assert not (plain.passed and (guided is None or guided.passed))
