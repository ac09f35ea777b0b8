"""A wrong result, however slightly wrong, is told; a right one in any precision is not."""

import pytest
import torch

from atma.bench.parity import Way, compare, draw, require, rms

CPU = torch.device("cpu")


def product(tensors):
    return [tensors[0] @ tensors[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_right_result_passes_in_every_precision(dtype, with_gradients):
    compare("a product", product, product, [draw((40, 30), 0), draw((30, 20), 1)], Way(dtype, CPU, with_gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_off_by_a_hundredth_is_told(dtype):
    tensors = [draw((40, 30), 0), draw((30, 20), 1)]
    with pytest.raises(ValueError, match=r"no figures: a product is .* off its float64 reference"):
        compare("a product", lambda x: [product(x)[0] * 1.03], product, tensors, Way(dtype, CPU))


def test_a_wrong_gradient_of_a_right_result_is_told():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.01 * grad

    def wrong(tensors):
        return [Wrong.apply(product(tensors)[0])]

    tensors = [draw((4, 3), 0), draw((3, 2), 1)]
    compare("a product", wrong, product, tensors, Way(torch.float32, CPU))
    with pytest.raises(ValueError, match="no figures"):
        compare("a product", wrong, product, tensors, Way(torch.float32, CPU, True))


def test_what_is_not_a_number_is_told():
    with pytest.raises(ValueError, match="is nan"):
        require("x", [torch.tensor([torch.nan])], [torch.zeros(1)], [1.0])


def test_rms_is_the_root_of_the_mean_square():
    assert rms(torch.tensor([3.0, 4.0])) == pytest.approx(12.5**0.5)


def test_a_gradient_that_is_exactly_nothing_may_come_out_as_the_rounding_of_a_rounding():
    """As that of a softmax over one key, which some kernels compute as a difference."""

    def one(tensors):
        x, y = tensors
        return [x + 0.0 * y]

    def nearly(off):
        return lambda tensors: [tensors[0] + off * tensors[1]]

    tensors, way = [draw((4, 3), 0), draw((4, 3), 1)], Way(torch.bfloat16, CPU, True)
    compare("nearly", nearly(1e-7), one, tensors, way)
    with pytest.raises(ValueError, match="no figures"):
        compare("nearly", nearly(1e-3), one, tensors, way)
