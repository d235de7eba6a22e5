"""`bench training --shape`, at a small SDXL on the CPU: the code that runs on a GPU at full size, and its laws."""

import json

import pytest
import torch
from torch import nn

from devtools import bench
from tidetable.benchmarks import published, training, training_apart
from tidetable.benchmarks.training_apart import Case, measure
from tidetable.benchmarks.training_arms import ARMS, RANK, WholeNetwork
from tidetable.benchmarks.training_shapes import (
    PEAK_FLOPS,
    SHAPES,
    build,
    bytes_of,
    bytes_of_step,
    flops_per_sample,
    meta_inputs,
    peak_flops,
)


TINY, META, CPU = SHAPES["tiny-sdxl"], torch.device("meta"), torch.device("cpu")
PEAK = 1e12
COMMAND = [
    "--shape",
    "tiny-sdxl",
    "--batches",
    "4",
    "--checkpointing",
    "off",
    "--steps",
    "1",
    "--peak-flops",
    str(PEAK),
]


def test_an_arm_in_a_process_of_its_own():
    found = list(training.run([*COMMAND, "--arms", "tidetable"]))
    assert {(case, arm) for case, arm, *_ in found} == {("tiny-sdxl-b4", "tidetable")}
    values = {metric: value for _, _, metric, value, _ in found}
    assert list(values) == list(training_apart.UNITS)
    assert (values["rows_per_step"], values["rows_at_once"], values["oom"]) == (4, 4, 0)
    assert values["mfu"] == pytest.approx(values["samples_per_second"] * values["flops_per_sample"] / PEAK)
    weights = bytes_of(published.on_meta(TINY, TINY.full).diffusion_model)
    assert values["peak_bytes"] > values["weights_bytes"] == weights and values["setup_seconds"] > 0


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.startswith("core")])
def test_every_prompt_of_a_batch_for_every_sample_of_it_in_the_node_of_comfyui(arm, taken):
    found = measure(arm, Case("tiny-sdxl", "cpu", 4, True, 1))
    assert found["rows_per_step"] == 16 == taken[True]["rows_per_step"]
    assert found["peak_bytes"] > found["weights_bytes"] == taken[True]["weights_bytes"]


@pytest.fixture(scope="module")
def taken():
    """Without gradient checkpointing, and with it."""
    return {blocks: measure("tidetable", Case("tiny-sdxl", "cpu", 16, blocks, 1)) for blocks in (False, True)}


def test_checkpointing_takes_less_memory_and_is_the_same_work(taken):
    activations = {blocks: found["peak_bytes"] - found["weights_bytes"] for blocks, found in taken.items()}
    assert activations[True] < 0.8 * activations[False]
    assert taken[True]["rows_per_step"] == taken[False]["rows_per_step"] == 16


def test_rows_of_arms_that_ran_ran_out_of_memory_and_failed(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("there is no more")

    monkeypatch.setitem(ARMS, "core", full)
    no_memory = measure("core", Case("tiny-sdxl", "cpu", 1, False, 1))
    assert set(no_memory) == {"oom", "weights_bytes"}
    ran = {"samples_per_second": 8.0, "peak_bytes": 30}, {"samples_per_second": 2.0, "peak_bytes": 100}
    for ours, core in (ran, (no_memory, None), (ran[0], no_memory)):
        answers = {"tidetable": ours, "core": core}
        monkeypatch.setattr(training_apart, "in_a_process", lambda arm, case, answers=answers: answers[arm])
        found = list(training.run([*COMMAND, "--arms", "tidetable", "core"]))
        values = {(arm, metric): value for _, arm, metric, value, _ in found}
        pair = {metric: value for (arm, metric), value in values.items() if arm == "tidetable / core"}
        assert pair == ({"samples_per_second": 4.0, "peak_bytes": 0.3} if (ours, core) == ran else {})
        if core is None:
            assert values["core", "failed"] == values["tidetable", "oom"] == 1
            assert values["tidetable", "peak_bytes"] is values["tidetable", "mfu"] is None
            written = json.dumps(list(bench.checked(found)))
            assert '"metric": "peak_bytes", "value": null' in written and "NaN" not in written
            assert "unknown" in "".join(map(bench.format_row, bench.checked(found)))


def test_the_loop_is_refused_where_it_cannot_follow():
    with pytest.raises(ValueError, match="fp32 and without checkpointing only"):
        measure("loop", Case("tiny-sdxl", "cpu", 1, False, 1))


def test_flops_of_a_sample_layer_by_layer():
    """Twice a frozen layer's products (once where its input needs no gradient), three times those of attention and of
    an adapter's second factor; counted from the sizes that each layer sees."""
    network, expected = published.on_meta(TINY, TINY.full).diffusion_model.requires_grad_(False), []

    def layer(module, args, output):
        (x,), out = args, output.numel()
        outs, kernel = (module.weight.shape[0], module.weight[0].numel())
        assert output.shape[-1 if isinstance(module, nn.Linear) else 1] == outs
        base, down, up = (2 * n for n in (out * kernel, out // outs * RANK * kernel, out * RANK))
        expected.append((base + down) * (1 + x.requires_grad) + down + 3 * up)

    def attend(function, q, k, v, heads, **options):
        expected.append(3 * 2 * 2 * q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2])
        return published.torch_attention(function, q, k, v, heads, **options)

    for module in WholeNetwork(dict(network.named_modules()), META).layers.values():
        module.register_forward_hook(layer)
    x, t, conditions = meta_inputs(TINY)
    conditions["transformer_options"]["optimized_attention_override"] = attend
    with WholeNetwork(dict(network.named_modules()), META).installed():
        network(x, t, **conditions)
    assert flops_per_sample(TINY) == sum(expected)


def test_sdxl_has_its_published_size():
    sdxl = SHAPES["sdxl"]
    network = published.on_meta(sdxl, sdxl.full).diffusion_model
    assert sum(parameter.numel() for parameter in network.parameters()) == 2_567_463_684
    assert meta_inputs(sdxl)[0].shape == (1, 4, 128, 128)


def test_every_parameter_has_memory_of_its_own():
    network = build("tiny-sdxl", CPU).model.diffusion_model
    addresses = [parameter.data_ptr() for parameter in network.parameters()]
    assert len(set(addresses)) == len(addresses) and all(p.dtype == torch.bfloat16 for p in network.parameters())


def test_memory_counted_on_shapes_is_what_a_step_takes(taken):
    rows = list(training.run(["--shape", "tiny-sdxl", "--batches", "16", "--steps", "0"]))
    counted = {(case, arm): value for case, arm, metric, value, _ in rows if metric == "counted_bytes"}
    for blocks, case in ((False, "tiny-sdxl-b16"), (True, "tiny-sdxl-b16-blocks")):
        assert counted[case, "tidetable"] == pytest.approx(taken[blocks]["peak_bytes"], rel=0.05)
        assert counted[case, "tidetable / core"] == counted[case, "tidetable"] / counted[case, "core"] < 0.6


def test_only_known_devices_have_a_peak(monkeypatch):
    assert peak_flops(CPU) is None
    for name, expected in (("NVIDIA H200", 989.4e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == expected == PEAK_FLOPS.get(name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_arm_on_a_gpu():
    found = measure("tidetable", Case("tiny-sdxl", "cuda", 4, False, 2))
    assert found["oom"] == 0 and found["rows_per_step"] == 4 and found["samples_per_second"] > 0
    counted = bytes_of_step(TINY, 4, False)
    assert found["weights_bytes"] < found["peak_bytes"] < 4 * counted + 2**27  # workspaces of cuBLAS and cuDNN
