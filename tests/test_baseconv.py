"""BaseConv against torch's own convolution, in the form that Zoology writes it."""

import pytest
import torch
import torch.nn.functional as F

from zoo.mixers.base import Context, Dims
from zoo.mixers.baseconv import BaseConv


@pytest.mark.parametrize("taps", [1, 3, 4])
def test_it_is_a_gated_depthwise_convolution_with_a_skip(taps):
    torch.manual_seed(0)
    mixer = BaseConv(BaseConv.Config(kernel_size=taps), Dims(8, 2, 2, 4)).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    weight = mixer.filter.flip(-1)  # torch's last tap is the token itself
    convolved = F.conv1d(x.mT, weight, mixer.filter_bias, padding=taps - 1, groups=8)[..., :11].mT
    torch.testing.assert_close(mixer(x, Context())[0], convolved * mixer.projection(x) + x)
    assert mixer.reach == taps - 1
    assert mixer.state_bytes(1000, 2) == (taps - 1) * 8 * 2


def test_a_kernel_of_nothing_is_refused():
    with pytest.raises(ValueError, match="kernel_size = 0"):
        BaseConv.Config(kernel_size=0)
