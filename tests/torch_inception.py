"""Inception-V3 in PyTorch with the layers of pytorch-fid and the parameter names of NVIDIA's TorchScript file."""

from collections import OrderedDict

import torch


class Unit(torch.nn.Module):
    """NVIDIA's Conv2dLayer."""

    def __init__(self, inputs, outputs, size=(1, 1), stride=1, pad=True):
        super().__init__()
        self.stride, self.padding = stride, [side // 2 if pad and stride == 1 else 0 for side in size]
        fan = inputs * size[0] * size[1]
        self.weight = torch.nn.Parameter(torch.randn(outputs, inputs, *size) * (2 / fan) ** 0.5)
        self.mean, self.beta = (torch.nn.Parameter(0.1 * torch.randn(outputs)) for _ in range(2))
        self.var = torch.nn.Parameter(0.5 + torch.rand(outputs))

    def forward(self, x):
        x = torch.nn.functional.conv2d(x, self.weight, None, self.stride, self.padding)
        x = torch.nn.functional.batch_norm(x, self.mean, self.var, None, self.beta, False, 0.1, 0.001)
        return torch.nn.functional.relu(x)


def tower(inputs, *units):
    """A sequence of units named conv, conv_1, ..."""
    found = OrderedDict()
    for number, (outputs, *rest) in enumerate(units):
        found[f"conv_{number}" if number else "conv"] = Unit(inputs, outputs, *rest)
        inputs = outputs
    return torch.nn.Sequential(found)


class Block(torch.nn.Module):
    """Parallel branches, concatenated; the branch `pooled` gets the pooled input.

    Without `pooled`, the pooled input itself is the last branch.
    """

    def __init__(self, pool, pooled=None, **branches):
        super().__init__()
        self.pool, self.pooled, self.names = pool, pooled, list(branches)
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x):
        results = [getattr(self, name)(self.pool(x) if name == self.pooled else x) for name in self.names]
        return torch.cat(results if self.pooled else [*results, self.pool(x)], 1)


class Coarse(torch.nn.Module):
    """InceptionE, whose units have no submodule in NVIDIA's names."""

    def __init__(self, inputs, pool):
        super().__init__()
        self.pool = pool
        self.conv, self.tower_conv = Unit(inputs, 320), Unit(inputs, 384)
        self.tower_mixed_conv, self.tower_mixed_conv_1 = Unit(384, 384, (1, 3)), Unit(384, 384, (3, 1))
        self.tower_1_conv, self.tower_1_conv_1 = Unit(inputs, 448), Unit(448, 384, (3, 3))
        self.tower_1_mixed_conv, self.tower_1_mixed_conv_1 = Unit(384, 384, (1, 3)), Unit(384, 384, (3, 1))
        self.tower_2_conv = Unit(inputs, 192)

    def forward(self, x):
        a, b = self.tower_conv(x), self.tower_1_conv_1(self.tower_1_conv(x))
        first, second = self.tower_mixed_conv(a), self.tower_mixed_conv_1(a)
        third, fourth = self.tower_1_mixed_conv(b), self.tower_1_mixed_conv_1(b)
        return torch.cat([self.conv(x), first, second, third, fourth, self.tower_2_conv(self.pool(x))], 1)


def fine(inputs, pooled):
    mean = torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    towers = {
        "tower": tower(inputs, (48,), (64, (5, 5))),
        "tower_1": tower(inputs, (64,), (96, (3, 3)), (96, (3, 3))),
        "tower_2": tower(inputs, (pooled,)),
    }
    return Block(mean, "tower_2", conv=Unit(inputs, 64), **towers)


def middle(width):
    mean, across, down = torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False), (1, 7), (7, 1)
    towers = {
        "tower": tower(768, (width,), (width, across), (192, down)),
        "tower_1": tower(768, (width,), (width, down), (width, across), (width, down), (192, across)),
        "tower_2": tower(768, (192,)),
    }
    return Block(mean, "tower_2", conv=Unit(768, 192), **towers)


class Graph(torch.nn.Module):
    """Images [b, 3, 299, 299] in [-1, 1] to logits; `layers` alone gives the features of pool_3."""

    def __init__(self):
        super().__init__()
        downsample = torch.nn.MaxPool2d(3, 2)
        threes, last = (3, 3), ((3, 3), 2)
        self.layers = torch.nn.Sequential(
            OrderedDict(
                conv=Unit(3, 32, *last),
                conv_1=Unit(32, 32, threes, 1, False),
                conv_2=Unit(32, 64, threes),
                pool0=downsample,
                conv_3=Unit(64, 80),
                conv_4=Unit(80, 192, threes, 1, False),
                pool1=downsample,
                mixed=fine(192, 32),
                mixed_1=fine(256, 64),
                mixed_2=fine(288, 64),
                mixed_3=Block(
                    downsample, conv=Unit(288, 384, *last), tower=tower(288, (64,), (96, threes), (96, *last))
                ),
                **{f"mixed_{4 + k}": middle(width) for k, width in enumerate((128, 160, 160, 192))},
                mixed_8=Block(
                    downsample,
                    tower=tower(768, (192,), (320, *last)),
                    tower_1=tower(768, (192,), (192, (1, 7)), (192, (7, 1)), (192, *last)),
                ),
                mixed_9=Coarse(1280, torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
                mixed_10=Coarse(2048, torch.nn.MaxPool2d(3, 1, 1)),
                pool2=torch.nn.AvgPool2d(8),
            )
        )
        self.output = torch.nn.Linear(2048, 1008)

    def forward(self, x):
        return self.output(self.layers(x).flatten(1))
