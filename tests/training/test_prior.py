"""Prior preservation: nothing at the start, then the distance to the answer without the adapter, measured as asked."""

from contextlib import nullcontext

import pytest
import torch

from tidetable.schedules.prediction import denoised
from tidetable.schedules.process import VP, Flow
from tidetable.tests.training.solvable import PointDenoiser, point_dataset
from tidetable.tests.training.test_adapter_kinds import KINDS, adapters
from tidetable.tests.training.test_masked import Pointwise, T, box_masks, samples
from tidetable.training.config import TrainConfig
from tidetable.training.data import Dataset
from tidetable.training.engine import Trainer
from tidetable.training.optimizers import OptimizerConfig
from tidetable.training.prior import LossTerms
from tidetable.training.recipe import ObjectiveConfig


CLASS = 0.5


def adapted(process=None, prediction="velocity", trained=True):
    """A pointwise denoiser, frozen, with a LoRA that has already moved."""
    torch.manual_seed(3)
    denoiser = Pointwise(process, prediction).requires_grad_(False)
    network = adapters("lora", {"layer": denoiser.layer})
    if trained:
        network.adapters["layer"].up.data.normal_()
    return denoiser, network


def dataset(count=3):
    x0 = samples(count)[0]
    conditions = [1.0 + row for row in range(count)]
    return Dataset(list(x0), conditions, masks=list(box_masks(count)), prior_conditions=[CLASS] * count)


def terms_of(denoiser, network, without_adapter=None, **settings):
    """[losses [B]] of one batch with three samples."""
    data, (x0, eps) = dataset(), samples()
    terms = LossTerms(denoiser, data, ObjectiveConfig(**settings), without_adapter or network.disabled)
    with network.installed():
        return [terms(name, [0, 1, 2], x0, data.conditions, eps, T, eps) for name in terms.names]


def answers(denoiser, network, conditions):
    """(x_t, prediction with the adapter, prediction without) of that batch."""
    x_t = denoiser.process.mix(*samples(), T)
    without = denoiser.predict(x_t, T, conditions)
    with network.installed():
        return x_t, denoiser.predict(x_t, T, conditions), without


@pytest.mark.parametrize("prior_on", ["class_prompt", "outside_mask"])
@pytest.mark.parametrize("loss", ["mse", "huber", "l1"])
def test_at_the_start_it_is_zero_and_so_is_its_gradient(prior_on, loss):
    denoiser, network = adapted(trained=False)
    found = []
    for weight in (0.0, 1e6):
        settings = {"loss": loss, "masked_loss": "on", "prior_on": prior_on, "prior_weight": weight}
        losses = torch.stack(terms_of(denoiser, network, **settings)).sum(0)
        found.append((losses, *torch.autograd.grad(losses.sum(), network.trainable())))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_on_the_class_prompt_it_is_the_squared_distance_to_the_answer_without_the_adapter():
    denoiser, network = adapted()
    _, moved, base = answers(denoiser, network, [CLASS] * 3)
    data, prior = terms_of(denoiser, network, prior_weight=0.3, masked_loss="normalized")
    expected = 0.3 * (moved - base.detach()).square().flatten(1).mean(1)
    assert torch.allclose(prior, expected)
    assert torch.equal(data, terms_of(denoiser, network, masked_loss="normalized")[0])
    wanted = torch.autograd.grad(expected.sum(), network.trainable())
    for one, other in zip(torch.autograd.grad(prior.sum(), network.trainable()), wanted, strict=True):
        assert torch.allclose(one, other)


def test_outside_the_mask_it_holds_to_the_answer_on_the_samples_own_prompt():
    denoiser, network = adapted()
    _, moved, base = answers(denoiser, network, dataset().conditions)
    together = terms_of(denoiser, network, prior_weight=0.3, prior_on="outside_mask", masked_loss="on")
    data = terms_of(denoiser, network, masked_loss="on")
    outside = ((1 - box_masks()) * (moved - base).square()).flatten(1).mean(1)
    assert len(together) == len(data) == 1
    assert torch.allclose(together[0], data[0] + 0.3 * outside)


@pytest.mark.parametrize(("process", "prediction"), [(Flow(), "velocity"), (VP.from_betas(), "eps")])
def test_it_is_measured_where_the_objective_says(process, prediction):
    """In x0 it is the distance of the two clean samples; a weight at t multiplies it like the loss of the data."""
    denoiser, network = adapted(process, prediction)
    x_t, *both = answers(denoiser, network, [CLASS] * 3)
    clean = [denoised(out.double(), prediction, x_t.double(), T, process) for out in both]
    prior = terms_of(denoiser, network, prior_weight=1.0, prediction="x0", max_weight=1e9)[1]
    assert torch.allclose(prior.double(), (clean[0] - clean[1]).square().flatten(1).mean(1), rtol=1e-4)
    weighted = terms_of(denoiser, network, prior_weight=1.0, weighting="cosmap")
    plain = terms_of(denoiser, network, prior_weight=1.0)
    assert torch.allclose(weighted[1] / plain[1], weighted[0] / plain[0], rtol=1e-4)
    assert not torch.allclose(weighted[1], plain[1], rtol=1e-2)


@pytest.mark.parametrize("prior_on", ["class_prompt", "outside_mask"])
def test_accumulated_gradients_are_those_of_the_large_batch(prior_on):
    objective = ObjectiveConfig(prior_weight=2.0, prior_on=prior_on, masked_loss="normalized", unmasked_weight=0.2)
    found = []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        denoiser, network = adapted()
        optimizer = OptimizerConfig(accumulate=accumulate, warmup=0)
        config = TrainConfig(batch_size=size, seed=1, objective=objective, optimizer=optimizer)
        trainer = Trainer(config, denoiser, network.trainable(), dataset(4), without_adapter=network.disabled)
        with network.installed():
            total = trainer._forward_backward(torch.Generator().manual_seed(0))
        found.append([total, *(parameter.grad for parameter in network.trainable())])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.allclose(one, two, rtol=1e-5, atol=1e-7)


def test_it_draws_no_random_numbers():
    """With a weight of almost nothing the run is the one without."""
    found = []
    for weight in (0.0, 1e-30):
        denoiser, network = adapted(trained=False)
        config = TrainConfig(steps=5, batch_size=2, objective=ObjectiveConfig(prior_weight=weight))
        trainer = Trainer(config, denoiser, network.trainable(), dataset(4), without_adapter=network.disabled)
        state = torch.get_rng_state()
        with network.installed():
            found.append([event.loss for event in trainer.run()])
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1]


# ── the switch ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", KINDS)
def test_switched_off_every_kind_is_the_layer_itself_and_comes_back(kind):
    layer = torch.nn.Linear(6, 4)
    x = torch.randn(5, 6)
    bare = layer(x)
    network = adapters(kind, {"layer": layer})
    with torch.no_grad():
        for parameter in network.trainable():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    with network.installed():
        moved = layer(x)
        assert not torch.allclose(moved, bare, atol=1e-4)
        with network.disabled():
            assert torch.equal(layer(x), bare)
            with network.disabled():
                pass
            assert torch.equal(layer(x), bare), "the inner switch does not undo the outer one"
        with pytest.raises(KeyboardInterrupt), network.disabled():
            raise KeyboardInterrupt
        assert torch.equal(layer(x), moved)


def test_an_interrupt_in_the_answer_without_the_adapter_switches_it_on_again():
    denoiser, network = adapted()
    original, calls = denoiser.predict, []

    def predict(*args):
        calls.append(network.enabled)
        if not network.enabled:
            raise KeyboardInterrupt
        return original(*args)

    denoiser.predict = predict
    with pytest.raises(KeyboardInterrupt):
        terms_of(denoiser, network, prior_weight=1.0)
    assert calls == [True, False] and network.enabled and not denoiser.layer._forward_hooks


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_trains_the_model_itself_refuses_it():
    denoiser = PointDenoiser()
    config = TrainConfig(objective=ObjectiveConfig(prior_weight=0.5))
    with pytest.raises(ValueError, match=r"prior_weight is 0\.5, but this run trains the model itself.*use 0"):
        Trainer(config, denoiser, list(denoiser.parameters()), dataset())


def test_without_a_prompt_both_ways_to_connect_one_are_named():
    denoiser = PointDenoiser()
    config = TrainConfig(objective=ObjectiveConfig(prior_weight=0.5))
    with pytest.raises(ValueError, match="prior_conditioning of Training Objective .* or empty of Train LoRA"):
        Trainer(config, denoiser, list(denoiser.parameters()), point_dataset(), without_adapter=nullcontext)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prior_weight": -1.0}, "prior_weight is -1.0"),
        ({"prior_weight": 1.0, "flow": "graft"}, "prior_weight is 1.0, but it must be 0 with flow 'graft'"),
        (
            {"prior_weight": 1.0, "prior_on": "outside_mask"},
            "masked_loss is 'off', but it must be 'on' or 'normalized'",
        ),
        ({"prior_on": "everywhere"}, "prior_on"),
        ({"masked_loss": "yes"}, "masked_loss"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ObjectiveConfig(**settings)
