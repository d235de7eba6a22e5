"""benchmarks/training.py: the arms train the same thing, its counts are exact, and what differs is not timed."""

import pytest
import torch

from tidetable.benchmarks import training
from tidetable.benchmarks.training_arms import ARMS, WholeNetwork
from tidetable.benchmarks.training_cases import NETWORKS, build, make_data
from tidetable.benchmarks.training_parity import TOLERANCE, Difference, check, compare, core_points, loop
from tidetable.runtime.trainable import training_session
from tidetable.training.recipe import ObjectiveConfig


SMALL = ["--cases", "unet-b1", "mmdit-b4", "--rounds", "2", "--steps", "1", "--side", "8", "--threads", "1"]


@pytest.fixture(scope="module")
def rows():
    found = list(training.run(SMALL))
    return {(case, arm, metric): value for case, arm, metric, value, _ in found}


def test_every_arm_has_its_rows(rows):
    measured = {"rows_per_step", "peak_bytes", "setup_seconds", "samples_per_second", "samples_per_cpu_second"}
    for case in ("unet-b1", "mmdit-b4"):
        for arm in ARMS:
            assert {m for c, a, m in rows if (c, a) == (case, arm)} - {
                "loss_difference",
                "gradient_difference",
            } == measured
        for base in {"core", "core-bypass", "loop"} & set(ARMS):
            for arm in ("tidetable", "tidetable-node"):
                for metric in ("samples_per_second", "spread", "samples_per_cpu_second", "cpu_spread"):
                    assert (case, f"{arm} / {base}", metric) in rows
    assert all(value > 0 for (_, _, metric), value in rows.items() if metric in measured)


def test_rows_that_go_through_the_network(rows):
    """ComfyUI's node gives every sample of a batch every prompt of the batch; the others one each."""
    for arm in ARMS:
        per_prompt = 4 if arm.startswith("core") else 1
        assert rows["mmdit-b4", arm, "rows_per_step"] == 4 * per_prompt
        assert rows["unet-b1", arm, "rows_per_step"] == 1


def test_the_arms_agree_on_loss_and_gradient(rows):
    compared = {arm for arm in ARMS if arm not in ("core", "tidetable-node")}
    for network in NETWORKS:
        for arm in compared:
            assert rows[f"{network}-b1", arm, "loss_difference"] < TOLERANCE
            assert rows[f"{network}-b1", arm, "gradient_difference"] < TOLERANCE


def test_another_objective_is_seen_and_refused(monkeypatch):
    """The tolerance tells x0 from the network's own target, and no row is timed then."""
    monkeypatch.setattr("tidetable.benchmarks.training_parity.X0", ObjectiveConfig())
    found = compare("unet", make_data(8))["tidetable"]
    assert found.loss > 100 * TOLERANCE and found.gradient > 100 * TOLERANCE
    with pytest.raises(ValueError, match="unet: tidetable and ComfyUI's node differ by .* so nothing is timed"):
        list(training.run(SMALL))


@pytest.mark.parametrize(("loss", "gradient"), [(2e-5, 0.0), (0.0, 2e-5), (float("nan"), 0.0), (0.0, float("nan"))])
def test_a_difference_above_the_tolerance_is_refused(loss, gradient):
    check("unet", {"loop": Difference(TOLERANCE, TOLERANCE)})
    with pytest.raises(ValueError, match="loop"):
        check("unet", {"loop": Difference(loss, gradient)})


def test_a_missing_tensor_is_refused():
    points = core_points("core", "mmdit", make_data(8))
    del points[0].parameters["final_layer.linear.diff_b"]
    with pytest.raises(ValueError, match=r"not the same tensors are trained: final_layer\.linear\.diff_b"):
        loop("mmdit", make_data(8), points[0])


def test_the_second_step_has_a_gradient_for_every_pair():
    first, second = core_points("core", "unet", make_data(8))
    ups = [name for name in first.gradients if name.endswith("lora_up.weight")]
    assert ups and all(not first.gradients[name].any() and second.gradients[name].any() for name in ups)


def test_norms_and_biases_are_put_back():
    with training_session(build("unet")) as denoiser:
        network = denoiser.real.diffusion_model
        before = {name: (id(value), value.clone()) for name, value in network.named_parameters()}
        whole = WholeNetwork(dict(network.named_modules()), denoiser.device)
        with whole.installed():
            assert {id(value) for value in network.parameters()} != {entry[0] for entry in before.values()}
        with pytest.raises(RuntimeError), whole.installed():
            raise RuntimeError
        for name, value in network.named_parameters():
            assert id(value) == before[name][0] and torch.equal(value, before[name][1])
        assert not any(module._forward_hooks for module in network.modules())
