"""Layers that make their weight in forward: the same gradients bit for bit, and the weight is not kept."""

import copy

import pytest
import torch
from torch import nn

from tidetable.training.adapters import bias_of, weight_of
from tidetable.training.recast import recast


class Half:
    """Stores half the weight and doubles it in forward, as layers do that dequantize."""

    made = 0

    def doubled(self):
        self.made += 1
        return self.weight * 2


class Linear(Half, nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.doubled(), self.bias)


class Conv1d(Half, nn.Conv1d):
    def forward(self, x):
        return self._conv_forward(x, self.doubled(), self.bias)


class Conv2d(Half, nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.doubled(), self.bias)


class Conv3d(Half, nn.Conv3d):
    def forward(self, x):
        return self._conv_forward(x, self.doubled(), self.bias)


LAYERS = {
    "linear": (Linear(6, 4), (2, 3, 6)),
    "linear_without_bias": (Linear(6, 4, bias=False), (5, 6)),
    "conv1d": (Conv1d(6, 4, 3, padding=1), (2, 6, 9)),
    "conv2d": (Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 8, 8)),
    "conv2d_grouped": (Conv2d(6, 4, 3, groups=2, dilation=2), (2, 6, 8, 8)),
    "conv3d": (Conv3d(6, 4, 3, padding=1), (2, 6, 3, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_is_that_of_the_layer_and_the_weight_is_made_again(name):
    layer, shape = copy.deepcopy(LAYERS[name][0]).requires_grad_(False), LAYERS[name][1]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = layer(x)
    expected.square().sum().backward()
    slope, x.grad = x.grad, None
    kept, layer.made = [], 0
    with recast([layer]):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), id):
            output = layer(x)
        assert torch.equal(output, expected) and not kept and layer.made == 1
        output.square().sum().backward()
    assert torch.equal(x.grad, slope) and layer.made == 2
    assert "forward" not in vars(layer)


def test_the_result_may_be_added_to_in_place():
    """As Flux's blocks do with the output of a layer that carries no adapter."""
    layer = Linear(6, 4).requires_grad_(False)
    slopes = []
    for layers in ([], [layer]):
        x = torch.ones(2, 3, 6).requires_grad_()
        with recast(layers):
            output = layer(x)
            output += x[..., :4].square()
        output.square().sum().backward()
        slopes.append(x.grad)
    assert torch.equal(*slopes)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_trained_has_its_gradient(name):
    layer = Linear(6, 4).requires_grad_(False)
    getattr(layer, name).requires_grad_()
    slopes = []
    for layers in ([], [layer]):
        with recast(layers):
            layer(torch.ones(3, 6)).square().sum().backward()
        slopes.append(getattr(layer, name).grad.clone())
        getattr(layer, name).grad = None
    assert torch.equal(*slopes) and slopes[0].any()


def test_a_weight_that_is_there_stays_with_autograd():
    layer = nn.Linear(6, 4).requires_grad_(False)
    kept = []
    with recast([layer]), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), id):
        layer(torch.randn(3, 6).requires_grad_())
    assert kept == [layer.weight.data_ptr()]


class Moody(Linear):
    def forward(self, x):
        return super().forward(x) if self.made == 0 else x


def test_a_layer_that_does_something_else_the_second_time_is_an_error():
    layer = Moody(6, 6).requires_grad_(False)
    with recast([layer]), pytest.raises(RuntimeError, match="not again in backward"):
        layer(torch.randn(3, 6).requires_grad_()).sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_the_weight_that_a_layer_computes_with_is_read_off_it(bias):
    layer = nn.Linear(6, 4, bias).requires_grad_(False)
    stored = copy.deepcopy(layer)
    stored.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    stored.forward = lambda x: nn.functional.linear(x, stored.weight.float() * 2, stored.bias)
    assert torch.equal(weight_of(layer), layer.weight)
    assert torch.allclose(weight_of(stored), 2 * stored.weight.float(), atol=1e-6)
    if bias:
        assert torch.equal(bias_of(stored), layer.bias)


def test_a_packed_convolution_is_not_read_as_something_else():
    class Packed(torch.Tensor):
        pass

    layer = nn.Conv2d(3, 4, 3)
    layer.weight = nn.Parameter(torch.zeros(4, 30, dtype=torch.uint8).as_subclass(Packed), requires_grad=False)
    with pytest.raises(ValueError, match="this convolution .*cannot be read.*'lora', 'loha' or 'lokr'"):
        weight_of(layer)
