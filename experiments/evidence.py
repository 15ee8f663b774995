"""What the two papers report and claim, as data, with the configuration that measures each figure.

`ITEMS`: the tables and figures in the papers' order, DGL's and then SEDONA's. `CLAIMS`: what the
papers say, each with comparisons that decide it, whose bounds are ours. `WITHOUT_ROWS`: what they
say that no run's summary measures. `report.py` sets beside them what was measured. A run for a row
is experiments/train.py with one of the row's `configurations` as --config, and a --config.seed.

Source of the figures: the papers, their slides and the logs of the official code, as on top of the
files in experiments/configs.
"""

import functools
import itertools
import pathlib
import runpy
from typing import NamedTuple

from dgl_jax.config import Config, from_dict

ACCURACY, ERROR, FLOPS = "accuracy, %", "error, %", "FLOPs, %"
DISTANCE, PART = "distance, 0 to 2", "part of the whole, %"
LOSS, GIGA = "training loss", "10^9 multiply-adds an image"
COUNTED = (FLOPS, GIGA)  # Without training.
_CONFIGS = pathlib.Path(__file__).resolve().parent / "configs"


class Row(NamedTuple):
    """One figure of a paper, and what measures it.

    Attributes:
      label: as in the paper; unique in its item.
      config: the file below experiments/configs and its words: the paper's own setting.
      published: in `unit`; None where the paper gives no number.
      spread: the published standard deviation, of several runs; None for one run. Of what is
        counted, the rounding.
      unit: accuracy and error are on the test set; distances are `drift.density_distance`.
      quantity: where it is in summary.json, a list has an entry a block; or one of `CURVES` or
        `COUNTS` in `run_folders.py`.
      block: which block; -1 for the last.
      epoch: after so many epochs of the block's own updates, from metrics.jsonl; None: at the end.
      share: likewise after this share of its updates.
      tail: the mean over what was logged in this last share of its updates; of accuracies at least
        the last.
      short: words of the same file, each of which makes a reduced setting.
      each: words, over each of which the figure is a mean: the block that is slowed down.
    """

    label: str
    config: str
    published: float | None = None
    spread: float | None = None
    unit: str = ACCURACY
    quantity: str = "test_top1"
    block: int = -1
    epoch: float | None = None
    share: float | None = None
    tail: float | None = None
    short: tuple[str, ...] = ("short",)
    each: tuple[str, ...] = ()


class Item(NamedTuple):
    """A table or figure; `seeds`: how many are wanted; `note`: what to know when comparing."""

    paper: str
    name: str
    title: str
    seeds: int
    note: str
    rows: tuple[Row, ...]


class Comparison(NamedTuple):
    """``a - b > by``, in the rows' own unit; both are labels of an item's rows, or numbers."""

    a: str | float
    b: str | float
    by: float = 0.0

    def __str__(self) -> str:
        return f"({self.a}) − ({self.b}) > {self.by:g}"


class Claim(NamedTuple):
    """What a paper says, the item it rests on, and comparisons that decide it."""

    sentence: str
    item: str
    comparisons: tuple[Comparison, ...]


def configurations(row: Row, short: str = "") -> tuple[str, ...]:
    """``FILE.py:WORDS`` of each run of a row; with a word of `row.short`, its reduced setting's."""
    return tuple(",".join(filter(None, (row.config, word, short))) for word in row.each or ("",))


@functools.cache
def load(configuration: str) -> Config:
    """What ``FILE.py:WORDS`` stands for.

    Raises:
      UserError: an unknown word.
    """
    name, _, words = configuration.partition(":")
    get_config = _file(name)["get_config"]
    return from_dict((get_config(words) if words else get_config()).to_dict())


@functools.cache
def _file(name: str) -> dict:
    return runpy.run_path(str(_CONFIGS / name))


# fmt: off
# ---- DGL (Belilovsky, Eickenberg, Oyallon, ICML 2020).

_FIGURE2 = {  # At the end, after 50 and 200 epochs.
    "backprop": (84.6, 74.0, 80.6), "DGL": (85.1, 74.4, 79.7),
    "cDNI": (81.1, 69.2, 76.3), "DNI": (62.0, 41.7, 52.8),
}
_FIGURE2_LOSS = {"backprop": 0.021, "DGL": 0.053, "cDNI": 0.265, "DNI": 1.063}
_FIGURE34 = {"DGL": (78.35, 85.25, 87.90, 89.86), "sequential": (78.55, 85.77, 88.28, 89.13)}
_SHORTER, _LONGER = ("epochs=8", "longer", "short"), ("longer", "short")
_SHARES = {"a tenth": 0.1, "a half": 0.5, "nine tenths": 0.9}
_TABLE1 = {  # Accuracy; FLOPs and their rounding.
    "CNN": ("cnn", 92.2, 200.0, 0.5), "MLP": ("mlp", 90.6, 0.7, 0.05),
    "MLP-SR": ("mlp_sr", 91.2, 4.0, 0.05),
}
_SLOWED = tuple(f"block={block}" for block in range(6))
_TABLE3 = {  # Top-1, top-5.
    "VGG-13, DGL per layer, K = 10": ("vgg13_K=10", 64.4, 85.8),
    "VGG-13, DGL, K = 4": ("vgg13_K=4", 67.8, 88.0),
    "VGG-13, backprop": ("vgg13_backprop", 66.6, 87.5),
    "VGG-19, DGL, K = 4": ("vgg19_K=4", 69.2, 89.0),
    "VGG-19, DGL, K = 2": ("vgg19_K=2", 70.8, 90.2),
    "VGG-19, backprop": ("vgg19_backprop", 69.7, 89.7),
    "ResNet-152, DGL, K = 2": ("resnet152_K=2", 74.5, 92.0),
    "ResNet-152, backprop": ("resnet152_backprop", 74.4, 92.1),
}
_TABLE4 = {  # 10^9 of the network, of the heads; each with its rounding.
    "VGG-13, K = 4": ("vgg13_K=4", (13.0, 0.5), (0.2, 0.05)),
    "VGG-19, K = 4": ("vgg19_K=4", (20.0, 0.5), (0.2, 0.05)),
    "ResNet-152, K = 2": ("resnet152_K=2", (11.0, 0.5), (0.02, 0.005)),
}

_DGL = (
    Item("DGL", "Proposition 3.1", "inputs that come to rest, and gradients that fall", 3,
         "Figures 3 and 4's runs. Distance: of the density of a block's inputs from the final one, "
         "c_t in the paper, by channel on a probe batch. Part: of the sum over steps of the "
         "learning rate times the squared norm of the block's gradient, that of a mini-batch, "
         "whose noise stays; beside it, of the sum of the learning rates alone, which is what a "
         "constant norm would give. After a share of the block's own updates. The final density is "
         "the run's own: distances would fall towards it, to 0.12 to 0.15 of themselves between a "
         "tenth and a half, if all steps were as long as the rate (in one direction or at random).",
         (*(Row(f"{method}, inputs of block {block}, after {words}", f"figure34.py:{method.lower()}",
                unit=DISTANCE, quantity="input_drift", block=block, share=share, short=_SHORTER)
            for method, shares in (("DGL", _SHARES), ("sequential", ("a tenth",)))
            for block in (1, 2, 3) for words, share in _SHARES.items() if words in shares),
          *(Row(f"{method}, sum of block {block}, after a half", f"figure34.py:{method.lower()}",
                unit=PART, quantity="gradient_sum", block=block, share=0.5, short=_SHORTER)
            for method in ("DGL", "sequential") for block in range(4)),
          Row("DGL, rates alone, after a half", "figure34.py:dgl", unit=PART, quantity="rate_sum",
              share=0.5, short=_SHORTER))),
    Item("DGL", "Figure 2", "synthetic gradients against DGL and backprop, CIFAR-10", 1,
         "Published: the official logs, one seed. At the end both are means over the last ten of "
         "1,500 epochs. Loss: the last block's on its training batches. Of single runs the 0.5 % "
         "between DGL and backprop would not be decided.",
         (*(Row(f"{method}, after {epoch} epochs" if epoch else method,
                f"figure2.py:{method.lower()}", values[place], epoch=epoch,
                tail=None if epoch else 10 / 1500, short=() if epoch else ("short",))
            for place, epoch in enumerate((None, 50, 200))
            for method, values in _FIGURE2.items()),
          *(Row(f"{method}, training loss", f"figure2.py:{method.lower()}", loss, unit=LOSS,
                quantity="train_loss", tail=10 / 1500)
            for method, loss in _FIGURE2_LOSS.items()))),
    Item("DGL", "Table 1", "three auxiliary heads on a six-layer network, CIFAR-10", 3,
         "FLOPs: those of the head beside the largest block, of 256 channels at full width, by that "
         "block's layers', as XLA counts them (without padded positions). The paper's 0.7 % would "
         "be one layer of three of the MLP. The last block's head is the network's own. Where a "
         "network is narrower, heads weigh more.",
         (*(Row(f"{head}-aux", f"table1.py:{word}", top1, short=_LONGER)
            for head, (word, top1, _, _) in _TABLE1.items()),
          *(Row(f"{head}-aux, FLOPs", f"table1.py:{word}", flops, rounding, unit=FLOPS,
                quantity="aux_flops_ratio", block=2)
            for head, (word, _, flops, rounding) in _TABLE1.items()),
          *(Row(f"MLP-SR-aux, {label}", "table1.py:mlp_sr", unit=FLOPS, quantity=quantity)
            for label, quantity in (
                ("the costliest head's FLOPs by the largest block's", "costliest_head_by_block"),
                ("the costliest head's FLOPs by the network's", "costliest_head"),
                ("all heads' FLOPs by the network's", "all_heads"))))),
    Item("DGL", "Figures 3 and 4", "learning curves of a four-layer network, CIFAR-10", 3,
         "Published: the official logs, one seed; the text says six layers, code and logs have "
         "four. Epochs are a block's own: sequential training takes four times as many in all. Three "
         "tenths are 15 of 50 epochs, where the rate first drops: the last evaluation up to there, "
         "and the mean of all of them, as one alone swings by 10 % and more while the rate is high.",
         (*(Row(f"{method}, block {block}", f"figure34.py:{method.lower()}", value, block=block,
                short=_SHORTER)
            for method, values in _FIGURE34.items() for block, value in enumerate(values)),
          *(Row(f"{method}, block 3, after three tenths", f"figure34.py:{method.lower()}", value,
                block=3, share=0.3, short=_SHORTER)
            for method, value in (("DGL", 76.2), ("sequential", 85.5))),
          *(Row(f"{method}, block 3, mean over the first three tenths", f"figure34.py:{method.lower()}",
                value, quantity="mean_top1", block=3, share=0.3, short=_SHORTER)
            for method, value in (("DGL", 68.41), ("sequential", 84.29))),
          Row("backprop", "figure34.py:backprop", short=_SHORTER))),
    Item("DGL", "Table 2", "ResNet-110 in K = 2 blocks, CIFAR-10", 3,
         "Published: DGL over three seeds; the others quoted there from Huo et al. 2018.",
         (Row("backprop", "table2.py:backprop", 93.53, short=_LONGER),
          Row("DDG", "table2.py:ddg", 93.41, short=_LONGER),
          Row("DGL", "table2.py:dgl", 93.5, spread=0.1, short=_LONGER),
          Row("DGL, the head's FLOPs by the network's", "table2.py:dgl", unit=FLOPS,
              quantity="costliest_head", short=()))),
    Item("DGL", "Table 3", "VGG and ResNet-152, ImageNet", 1,
         "bfloat16 here; the official head of ResNet-152 pools to 2x2 by a slip, ours to 4x4.",
         tuple(Row(f"{label}, top-{k}", f"table3.py:{row[0]}", row[place], quantity=f"test_top{k}")
               for place, k in ((1, 1), (2, 5)) for label, row in _TABLE3.items())),
    Item("DGL", "Figure 5", "asynchronous DGL, one block slowed down by S, CIFAR-10", 3,
         "The paper gives no numbers. A point is the mean over the seeds and the six blocks that "
         "are slowed down, or those of them that ran; at S = 1.0 none is.",
         (Row("synchronous DGL", "figure5.py:dgl"), Row("S = 1.0", "figure5.py:S=1.0"),
          *(Row(f"S = {s / 10}", f"figure5.py:S={s / 10}", each=_SLOWED) for s in range(11, 21)))),
    Item("DGL", "Figure 6", "asynchronous DGL, buffers of M mini-batches, S = 1.2, CIFAR-10", 3,
         "The paper gives no numbers, nor all its values of M. A point is the mean over the seeds "
         "and the six blocks that are slowed down, or those of them that ran.",
         tuple(Row(f"M = {size}", f"figure6.py:M={size}", short=_LONGER, each=_SLOWED)
               for size in (50, 40, 30, 20, 10, 5, 2, 1))),
    Item("DGL", "Table 4", "what heads cost, ImageNet", 1,
         "The paper writes GFLOPs, and seems to count multiply-adds: here half of XLA's floating-point "
         "operations of a forward pass, as the runs of Table 3 count them. Heads: all but the last "
         "block's, which is the network's own. Our head of ResNet-152 pools to 4x4.",
         tuple(Row(f"{label}, {part}", f"table3.py:{word}", *figure, unit=GIGA, quantity=quantity)
               for label, (word, network, heads) in _TABLE4.items()
               for part, figure, quantity in (("network", network, "network_multiply_adds"),
                                              ("heads", heads, "head_multiply_adds")))),
)

# ---- SEDONA (Pyeon, Moon, Hahn, Kim, ICLR 2021).

_WORDS = {
    "VGG-19": "vgg19", "ResNet-50": "resnet50", "ResNet-101": "resnet101",
    "ResNet-152": "resnet152", "PredSim": "predsim", "DGL": "dgl", "SEDONA": "sedona",
}
_METHODS = ("backprop", "PredSim", "DGL", "SEDONA")
_CIFAR10 = {  # Of these methods.
    "VGG-19": (12.31, 13.87, 12.19, 11.58), "ResNet-50": (7.99, 8.93, 8.27, 7.53),
    "ResNet-101": (7.14, 7.93, 8.30, 6.59), "ResNet-152": (6.35, 7.41, 7.39, 6.13),
}
_TINY = {  # backprop, DGL, SEDONA.
    "VGG-19": (58.74, 51.40, 56.56), "ResNet-50": (58.10, 53.96, 54.40),
    "ResNet-101": (62.01, 53.80, 59.12), "ResNet-152": (62.32, 57.64, 64.10),
}
_IMAGENET = {  # Top-1 and top-5 of ResNet-101, of ResNet-152.
    "backprop": (21.34, 5.86, 21.22, 5.79),
    "DGL, K = 2": (21.53, 5.84, 21.45, 5.86), "DGL, K = 4": (23.13, 6.82, 22.89, 6.80),
    "SEDONA, K = 2": (20.72, 5.39, 20.69, 5.58), "SEDONA, K = 4": (21.32, 5.83, 21.09, 5.13),
}


def _sedona(data: str, label: str, published: float | None = None, **fields) -> Row:
    """Its words are those of the label, such as ``ResNet-50, SEDONA, K = 4``."""
    words = [_WORDS.get(part, part.replace(" ", "")) for part in label.split(", ")]
    label += fields.pop("suffix", "")
    return Row(label, f"sedona_{data}.py:{','.join(words)}", published, **fields)


_SEDONA = (
    Item("SEDONA", "CIFAR-10", "four networks in K = 4 blocks", 3,
         "Published: the slides of the talk at ICLR 2021. Cuts and heads follow from the decision "
         "variables that the authors released. They chose the best state by validation, here it "
         "is the last.",
         tuple(_sedona("cifar10", f"{network}, {method}", value, unit=ERROR)
               for network, values in _CIFAR10.items()
               for method, value in zip(_METHODS, values, strict=True))),
    Item("SEDONA", "ResNet-101 by K", "ever more blocks, CIFAR-10", 3,
         "The slides draw this, with numbers for K = 4 alone. From K = 8 on the released "
         "variables differ by less than 1e-5 where it counts: chance chose among them.",
         (_sedona("cifar10", "ResNet-101, backprop", _CIFAR10["ResNet-101"][0], unit=ERROR),
          *(_sedona("cifar10", f"ResNet-101, {method}, K = {num_blocks}",
                    value if num_blocks == 4 else None, unit=ERROR)
            for num_blocks in (2, 4, 8, 16)
            for method, value in zip(_METHODS[1:], _CIFAR10["ResNet-101"][1:], strict=True)))),
    Item("SEDONA", "Ensembles", "SEDONA's last two heads together, K = 4", 3,
         "The slides draw this without numbers; of ImageNet see below.",
         tuple(_sedona("cifar10", f"{network}, SEDONA", unit=ERROR, quantity=quantity,
                       suffix=suffix)
               for network in _CIFAR10
               for quantity, suffix in (("test_top1", ""), ("ensemble_last_top1", ", two heads")))),
    Item("SEDONA", "Tiny-ImageNet", "cuts and heads found on CIFAR-10, K = 4", 1,
         "Single runs decide no difference below 1.4 %. Published: SEDONA's Table 2 as TRGL, "
         "module-wise training with a transport penalty (NeurIPS 2023), quotes it. PredSim's recipe "
         "is not built.",
         tuple(_sedona("tiny_imagenet", f"{network}, {method}", value)
               for network, values in _TINY.items()
               for method, value in zip(("backprop", "DGL", "SEDONA"), values, strict=True))),
    Item("SEDONA", "ImageNet", "cuts and heads found on CIFAR-10", 1,
         "Single runs decide no difference below 1.4 %, and most here are smaller. Published: the "
         "slides; that of two heads is from Papers with Code. They chose the best state on the images "
         "that they tested on, here it is the last.",
         (*(_sedona("imagenet", f"{network}, {method}", values[place + (k == 5)], unit=ERROR,
                    quantity=f"test_top{k}", suffix=f", top-{k}")
            for k in (1, 5) for network, place in (("ResNet-101", 0), ("ResNet-152", 2))
            for method, values in _IMAGENET.items()),
          _sedona("imagenet", "ResNet-152, SEDONA, K = 4", 20.2, unit=ERROR,
                  quantity="ensemble_last_top1", suffix=", two heads"))),
)

ITEMS = _DGL + _SEDONA

_FALLING = ("after a tenth", "after a half", "after nine tenths")


def _level(a: str, b: str, within: float) -> tuple[Comparison, Comparison]:
    return Comparison(a, b, by=-within), Comparison(b, a, by=-within)


CLAIMS = (
    Claim("With DGL the inputs of each block come to rest: their distribution comes ever nearer to "
          "the final one.",
          "Proposition 3.1",
          tuple(Comparison(*(f"DGL, inputs of block {block}, {when}" for when in pair))
                for block in (1, 2, 3) for pair in itertools.pairwise(_FALLING))),
    Claim("With sequential training they rest from the start, as the blocks below are finished: a "
          "distance below 0.05.",
          "Proposition 3.1",
          tuple(Comparison(0.05, f"sequential, inputs of block {block}, after a tenth")
                for block in (1, 2, 3))),
    Claim("With DGL gradient norms fall: of the sum of their squares, weighted by the learning rates, "
          "more lies in the first half of training than of the sum of the rates alone.",
          "Proposition 3.1",
          tuple(Comparison(f"DGL, sum of block {block}, after a half",
                           "DGL, rates alone, after a half") for block in range(4))),
    Claim("DGL beats DNI and cDNI.",
          "Figure 2", (Comparison("DGL", "DNI"), Comparison("DGL", "cDNI"))),
    Claim("DGL converges better than DNI and cDNI: to a lower training loss.",
          "Figure 2",
          tuple(Comparison(f"{other}, training loss", "DGL, training loss")
                for other in ("DNI", "cDNI"))),
    Claim("DGL's final training loss is close to backprop's: at most 0.05 above it.",
          "Figure 2",
          (Comparison("backprop, training loss", "DGL, training loss", by=-0.05),)),
    Claim("Here DGL generalizes better than backprop.",
          "Figure 2", (Comparison("DGL", "backprop"),)),
    Claim("MLP-SR-aux lies between MLP-aux and CNN-aux.",
          "Table 1", (Comparison("MLP-SR-aux", "MLP-aux"), Comparison("CNN-aux", "MLP-SR-aux"))),
    Claim("MLP-SR-aux takes less than 5 % of the network's FLOPs (as the text has it): the costliest "
          "head.",
          "Table 1", (Comparison(5.0, "MLP-SR-aux, the costliest head's FLOPs by the network's"),)),
    Claim("MLP-SR-aux takes less than 5 % of the network's FLOPs (as the text has it): all heads "
          "together.",
          "Table 1", (Comparison(5.0, "MLP-SR-aux, all heads' FLOPs by the network's"),)),
    Claim("MLP-SR-aux takes less than 5 % of the largest block's FLOPs (as the table has it): the head "
          "beside that block, and the costliest.",
          "Table 1",
          (Comparison(5.0, "MLP-SR-aux, FLOPs"),
           Comparison(5.0, "MLP-SR-aux, the costliest head's FLOPs by the largest block's"))),
    Claim("DGL catches up with sequential training (at the end at most 1 % behind) and is behind it "
          "early (the mean over the first three tenths).",
          "Figures 3 and 4",
          (Comparison("DGL, block 3", "sequential, block 3", by=-1.0),
           Comparison("sequential, block 3, mean over the first three tenths",
                      "DGL, block 3, mean over the first three tenths"))),
    Claim("DGL generalizes better than sequential training (the abstract; here, sometimes).",
          "Figures 3 and 4", (Comparison("DGL, block 3", "sequential, block 3"),)),
    Claim("With DGL each block is better than the one below.",
          "Figures 3 and 4",
          tuple(Comparison(f"DGL, block {k + 1}", f"DGL, block {k}") for k in range(3))),
    Claim("DGL is level with backprop and DDG at K = 2 (within 0.5 %).",
          "Table 2",
          (*_level("DGL", "backprop", within=0.5), *_level("DGL", "DDG", within=0.5))),
    Claim("There the head has less than 0.1 % of the network's FLOPs.",
          "Table 2", (Comparison(0.1, "DGL, the head's FLOPs by the network's"),)),
    Claim("DGL can perform as well as backprop on ImageNet (at most 1 % behind).",
          "Table 3",
          tuple(Comparison(f"{network}, DGL, K = {num_blocks}, top-1", f"{network}, backprop, top-1",
                           by=-1.0)
                for network, num_blocks in (("VGG-13", 4), ("VGG-19", 4), ("VGG-19", 2),
                                            ("ResNet-152", 2)))),
    Claim("Accuracy is kept up to S = 1.2 (within 0.5 % of synchronous DGL) and falls little at "
          "S = 2.0 (within 2 %).",
          "Figure 5",
          (*(Comparison(f"S = {s}", "synchronous DGL", by=-0.5) for s in ("1.0", "1.1", "1.2")),
           Comparison("S = 2.0", "synchronous DGL", by=-2.0))),
    Claim("The buffer's size matters little: a tiny one is within 1 % of M = 50.",
          "Figure 6", tuple(Comparison(f"M = {size}", "M = 50", by=-1.0) for size in (5, 2, 1))),
    *(Claim(f"SEDONA generalizes better than {method}: lower errors at K = 4.",
            "CIFAR-10",
            tuple(Comparison(f"{network}, {method}", f"{network}, SEDONA") for network in _CIFAR10))
      for method in _METHODS[:-1]),
    Claim("SEDONA stays good when blocks are more: at K = 16 within 1 % of K = 2, and better than DGL.",
          "ResNet-101 by K",
          (Comparison("ResNet-101, SEDONA, K = 2", "ResNet-101, SEDONA, K = 16", by=-1.0),
           Comparison("ResNet-101, DGL, K = 16", "ResNet-101, SEDONA, K = 16"))),
    Claim("Its last two heads together have lower errors than the last alone.",
          "Ensembles",
          tuple(Comparison(f"{network}, SEDONA", f"{network}, SEDONA, two heads")
                for network in _CIFAR10)),
    Claim("What SEDONA found on CIFAR-10 serves on Tiny-ImageNet: better than DGL.",
          "Tiny-ImageNet",
          tuple(Comparison(f"{network}, SEDONA", f"{network}, DGL") for network in _TINY)),
    Claim("What SEDONA found on CIFAR-10 outperforms backprop on ImageNet: lower errors at K = 2.",
          "ImageNet",
          tuple(Comparison(f"{network}, backprop, top-1", f"{network}, SEDONA, K = 2, top-1")
                for network in ("ResNet-101", "ResNet-152"))),
    Claim("What SEDONA found on CIFAR-10 serves on ImageNet: lower errors than DGL's.",
          "ImageNet",
          tuple(Comparison(f"{network}, DGL, K = {num_blocks}, top-1",
                           f"{network}, SEDONA, K = {num_blocks}, top-1")
                for network in ("ResNet-101", "ResNet-152") for num_blocks in (2, 4))),
)

# What the papers say that no row above measures: (where, what, what there is of it here).
WITHOUT_ROWS = (
    ("DGL, 4.1",
     "DNI diverges at the larger learning rates usual with SGD, DGL does not.",
     "Not run. Figure 2's are trained by Adam, there and here."),
    ("DGL, 4.1",
     "With a GPU a block DGL is 5 % (K = 2) and 18 % (K = 4) faster than DDG.",
     "Not run: needs several accelerators. experiments/benchmark.py parallel times blocks."),
    ("DGL, 4.1",
     "With a GPU a block DDG at K = 4 is about 2.3 times as fast as backprop.",
     "Not run: needs several accelerators."),
    ("DGL, 4.2",
     "ResNet-152 in two blocks fits 38 % more images on a GPU of 16 GB.",
     "By the compiled program's memory: experiments/results/README.md, Memory of a step."),
    ("SEDONA, ImageNet",
     "Training is 1.61 to 2.02 times as fast as backprop, with DGL 1.42 to 2.23 times.",
     "Not run: needs several accelerators."),
    ("SEDONA, discussion",
     "Grouping matters more than the choice of heads, and lower blocks most; no figures.",
     "Not run: --config.partition.search_heads=False takes the grouping alone."),
    ("SEDONA, Tiny-ImageNet",
     "PredSim: accuracies of 44.70, 47.48, 53.92 and 51.76 %.",
     "Not run: its recipe is not built."),
)
