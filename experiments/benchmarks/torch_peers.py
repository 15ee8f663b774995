"""The same networks and methods in PyTorch, written as one would there: what ours are timed against.

    python experiments/benchmarks/torch_peers.py --network=resnet18 --method=dgl --cuts=3 \
        [--width_factor=1 --batch_size=128 --image_size=32 --dtype=float32 --compile]

is a worker, a process without jax. It trains on one random batch, on the GPU if there is one, and
speaks JSON, one object a line. When it is set up and has made a step to warm up, it prints

    {"device": "cpu", "torch": "2.13.0+cpu"}

For each line on its standard input, a number of steps, it makes these steps and answers

    {"done": 20}

It ends with its input.

For any network of the benchmark and the weights of `load_from_jax`, the losses are those of
dgl_jax but for rounding. Only the running variances differ: PyTorch's are unbiased.
"""

import argparse
import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NUM_CLASSES = 10


class FlattenChannelsLast(nn.Module):
    """[B, C, H, W] to [B, H * W * C], in dgl_jax's order; in channels_last memory a view."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def _conv_bn(in_channels: int, channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(channels)]


class PadShortcut(nn.Module):
    """Every second pixel, and as many channels of zeros as there are channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, x.shape[1]))


class ResidualBlock(nn.Module):
    """ReLU of the sum of some convolutions and of a shortcut."""

    def __init__(self, convolutions: Sequence[nn.Module], shortcut: Sequence[nn.Module]):
        super().__init__()
        self.convolutions = nn.Sequential(*convolutions)
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolutions(x)
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


def _basic_block(in_channels: int, width: int, stride: int, projection: bool) -> ResidualBlock:
    convolutions = _conv_bn(in_channels, width, 3, stride)
    convolutions += [nn.ReLU(inplace=True), *_conv_bn(width, width, 3)]
    if in_channels == width and stride == 1:
        return ResidualBlock(convolutions, [])
    shortcut = _conv_bn(in_channels, width, 1, stride) if projection else [PadShortcut()]
    return ResidualBlock(convolutions, shortcut)


def _bottleneck_block(in_channels: int, width: int, stride: int) -> ResidualBlock:
    convolutions = [*_conv_bn(in_channels, width, 1), nn.ReLU(inplace=True)]
    convolutions += [*_conv_bn(width, width, 3, stride), nn.ReLU(inplace=True)]
    convolutions += _conv_bn(width, 4 * width, 1)
    if in_channels == 4 * width and stride == 1:
        return ResidualBlock(convolutions, [])
    return ResidualBlock(convolutions, _conv_bn(in_channels, 4 * width, 1, stride))


def _plain_layers(widths, pooled_layers) -> list[nn.Module]:
    """Layers without shortcuts; those of ``pooled_layers`` begin with a max pool."""
    layers = []
    for index, (in_channels, channels) in enumerate(itertools.pairwise([3, *widths])):
        modules = [nn.MaxPool2d(2)] if index in pooled_layers else []
        modules += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels)]
        layers.append(nn.Sequential(*modules, nn.ReLU(inplace=True)))
    return layers


def _residual_layers(widths, stage_sizes, kind) -> list[nn.Module]:
    """``kind`` is basic, bottleneck, or padded: basic, its shortcuts without parameters."""
    channels, layers = widths[0], []
    for stage_index, (width, size) in enumerate(zip(widths, stage_sizes, strict=True)):
        for index_in_stage in range(size):
            stride = 2 if stage_index > 0 and index_in_stage == 0 else 1
            if kind == "bottleneck":
                layers.append(_bottleneck_block(channels, width, stride))
                channels = 4 * width
            else:
                layers.append(_basic_block(channels, width, stride, kind == "basic"))
                channels = width
    stem = nn.Sequential(*_conv_bn(3, widths[0], 3), nn.ReLU(inplace=True))
    layers[0] = nn.Sequential(stem, layers[0])
    return layers


def _pooled_mlp(channels: int, size: int, num_hidden: int) -> nn.Sequential:
    size = min(2, size)
    width = channels * size**2
    modules = [nn.AdaptiveAvgPool2d(size), FlattenChannelsLast()]
    for _ in range(num_hidden):
        modules += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules, nn.Linear(width, _NUM_CLASSES))


def _mlp_sr(channels: int, size: int) -> nn.Sequential:
    """The auxiliary head."""
    size = math.ceil(size / 4)
    modules = [nn.AdaptiveAvgPool2d(size)]
    for _ in range(3):
        modules += [*_conv_bn(channels, channels, 1), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules, _pooled_mlp(channels, size, num_hidden=3))


def _vgg_head(channels: int, size: int, hidden: int) -> nn.Sequential:
    widths = (channels * (size // 2) ** 2, hidden, hidden)
    modules = [nn.MaxPool2d(2), FlattenChannelsLast()]
    for before, width in itertools.pairwise(widths):
        modules += [nn.Linear(before, width), nn.ReLU(inplace=True)]
    return nn.Sequential(*modules, nn.Linear(hidden, _NUM_CLASSES))


def _average_pool_head(channels: int, size: int) -> nn.Sequential:
    del size
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, _NUM_CLASSES))


# Widths, sizes of the stages, kind of block.
_RESNETS = {
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2), "basic"),
    "resnet50": ((64, 128, 256, 512), (3, 4, 6, 3), "bottleneck"),
    "resnet101": ((64, 128, 256, 512), (3, 4, 23, 3), "bottleneck"),
    "resnet152": ((64, 128, 256, 512), (3, 8, 36, 3), "bottleneck"),
    "resnet110": ((16, 32, 64), (18, 18, 18), "padded"),
}
NETWORKS = ("cnn4", "cnn6", "vgg19", *_RESNETS)


def make_network(
    name: str, width_factor: float
) -> tuple[list[nn.Module], Callable[[int, int], nn.Module]]:
    """A network's layers, and ``make_head(channels, size)`` for the last layer's map."""
    scaled = lambda width: max(1, round(width * width_factor))
    if name in _RESNETS:
        widths, stage_sizes, kind = _RESNETS[name]
        widths = [scaled(width) for width in widths]
        return _residual_layers(widths, stage_sizes, kind), _average_pool_head
    if name == "vgg19":
        widths = [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
        layers = _plain_layers([scaled(width) for width in widths], (2, 4, 8, 12))
        return layers, functools.partial(_vgg_head, hidden=scaled(4096))
    if name == "cnn4":
        multiples, width = (1, 2, 2, 4), scaled(64)
    else:
        multiples, width = (1, 2, 2, 4, 4, 4), scaled(128)
    layers = _plain_layers([multiple * width for multiple in multiples], (1, 3))
    return layers, functools.partial(_pooled_mlp, num_hidden=2)


class Block(nn.Module):
    """Some layers, a head and its loss; what is handed on to the next block carries no gradient."""

    def __init__(self, layers: nn.Sequential, head: nn.Module):
        super().__init__()
        self.layers = layers
        self.head = head

    def forward(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layers(x)
        loss = F.cross_entropy(self.head(x), labels)
        return x.detach(), loss


def make_blocks(
    name: str, width_factor: float, image_size: int, cuts: Sequence[int]
) -> list[Block]:
    """Cuts a network after the 0-based layers ``cuts``; without any, its one block is backprop's."""
    layers, make_head = make_network(name, width_factor)
    x = torch.zeros(1, 3, image_size, image_size)
    blocks = []
    for first, end in itertools.pairwise([0, *(cut + 1 for cut in cuts), len(layers)]):
        block_layers = nn.Sequential(*layers[first:end])
        with torch.no_grad():
            x = block_layers.eval()(x)
        make = make_head if end == len(layers) else _mlp_sr
        blocks.append(Block(block_layers, make(*x.shape[1:3])).train())
    return blocks


def make_train_step(
    blocks: Sequence[Block], dtype: str = "float32"
) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Returns ``train_step(images, labels)``, the local losses: DGL's Algorithm 1, or backprop.

    Args:
      blocks: those of `make_blocks`, on their device; each gets an optimizer.
      dtype: with bfloat16 the forward pass is autocast to it; otherwise nothing is changed.
    """
    # As dgl_jax.config.OptimizerConfig, with a constant learning rate.
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    optimizers = [sgd(block.parameters()) for block in blocks]

    def train_step(images: Tensor, labels: Tensor) -> list[Tensor]:
        x, losses = images, []
        for block, optimizer in zip(blocks, optimizers, strict=True):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
                x, loss = block(x, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    return train_step


# flax's modules and ours; its names of parameters and statistics and ours; of its axes, by rank,
# our order: [kh, kw, in, out] becomes [out, in, kh, kw].
_MODULES = {"Conv": nn.Conv2d, "Dense": nn.Linear, "BatchNorm": nn.modules.batchnorm._BatchNorm}
_NAMES = {
    "kernel": "weight", "scale": "weight", "bias": "bias",
    "mean": "running_mean", "var": "running_var",
}  # fmt: skip
_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def load_from_jax(blocks: Sequence[Block], states: Sequence[Any]) -> None:
    """Copies parameters and BatchNorm's statistics of a run of dgl_jax.

    Args:
      blocks: of the same network, cuts and heads.
      states: one `BlockState` a block, its trees of numpy arrays (`jax.device_get`).

    Raises:
      RuntimeError, ValueError: if a module, a parameter or a shape differs.
    """
    for block, state in zip(blocks, states, strict=True):
        modules = [*block.layers, block.head]
        params = [*state.params["layers"], state.params["head"]]
        stats = [*state.batch_stats["layers"], state.batch_stats["head"]]
        for module, module_params, module_stats in zip(modules, params, stats, strict=True):
            _load_module(module, module_params, module_stats)


def _load_module(module: nn.Module, params: Mapping, stats: Mapping) -> None:
    for kind, torch_kind in _MODULES.items():
        ours = [m for m in module.modules() if isinstance(m, torch_kind)]
        theirs = list(_flax_modules(params, kind))
        their_stats = list(_flax_modules(stats, kind)) or [{}] * len(theirs)
        for own, *trees in zip(ours, theirs, their_stats, strict=True):
            # Strict: that a name is missing or a shape is another raises.
            own.load_state_dict(
                {
                    _NAMES[name]: torch.tensor(array.transpose(_AXES[array.ndim]))
                    for tree in trees
                    for name, array in tree.items()
                }
            )


def _flax_modules(tree: Mapping, kind: str) -> Iterator[Mapping]:
    """A tree's modules of one kind, in the order in which they were called."""
    # jax sorts keys by the alphabet: the stem comes before its block, Conv_2 before Conv_10.
    for name in sorted(tree, key=lambda name: (name != "stem", len(name), name)):
        if name.startswith(f"{kind}_"):
            yield tree[name]
        elif isinstance(tree[name], Mapping):
            yield from _flax_modules(tree[name], kind)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--width_factor", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--cuts", default="", help="dgl: layers, such as 0,2; backprop has none.")
    parser.add_argument("--method", choices=("backprop", "dgl"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="With torch.compile.")
    return parser.parse_args()


def main() -> None:
    given = _parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")  # TF32, as in convolutions by default.
        torch.backends.cudnn.benchmark = True
    else:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    cuts = [int(cut) for cut in given.cuts.split(",") if cut] if given.method == "dgl" else []
    blocks = make_blocks(given.network, given.width_factor, given.image_size, cuts)
    for block in blocks:
        block.to(device, memory_format=torch.channels_last)
        if given.compile:
            # Blocks differ in shape: each is to have programs of its own, for its one shape.
            block.compile(fullgraph=True, dynamic=False, isolate_recompiles=True)
    train_step = make_train_step(blocks, given.dtype)
    images = torch.randn(given.batch_size, 3, given.image_size, given.image_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(_NUM_CLASSES, (given.batch_size,), device=device)
    tell = lambda **answer: print(json.dumps(answer), flush=True)

    def run(num_steps: int) -> None:
        for _ in range(num_steps):
            train_step(images, labels)
        if on_gpu:
            torch.cuda.synchronize()

    run(1)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    tell(device=name, torch=torch.__version__)
    for line in sys.stdin:
        run(int(line))
        tell(done=int(line))


if __name__ == "__main__":
    main()
