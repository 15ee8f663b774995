"""What the two papers report and claim, as data, with the configuration that measures each figure.

`ITEMS`: the tables and figures in the papers' order, DGL's and then SEDONA's. `CLAIMS`: what the
papers say, each with comparisons that decide it, whose bounds are ours. `report.py` sets beside
both what was measured. A run for a row is experiments/train.py with one of the row's
`configurations` as --config, and a --config.seed.

Source of the figures: the papers, their slides and the logs of the official code, as on top of the
files in experiments/configs.
"""

import functools
import itertools
import math
import pathlib
import runpy
from collections.abc import Mapping
from typing import NamedTuple

from dgl_jax.config import Config, from_dict

ACCURACY, ERROR, FLOPS = "accuracy, %", "error, %", "FLOPs, %"
DISTANCE, PART = "distance, 0 to 2", "part of the whole, %"
HOLDS, FAILS, UNDECIDED, NOT_RUN = "holds", "does not hold", "not decided", "not run"
# The standard deviations that are assumed where there is one seed only, ours or published (of FLOPs
# none). Per cent: at the end; at the end of reduced settings (what their seeds have, on average);
# and before the end, where rates are high and accuracies jump. And of a distance.
SPREAD, REDUCED_SPREAD, EARLY_SPREAD, DISTANCE_SPREAD = 0.5, 1.1, 2.0, 0.02
# Per cent by which a figure may miss the published one beyond its error and still be near.
NEAR = 1.0
_CONFIGS = pathlib.Path(__file__).resolve().parent / "configs"


class Row(NamedTuple):
    """One figure of a paper, and what measures it.

    Attributes:
      label: as in the paper; unique in its item.
      config: the file below experiments/configs and its words: the paper's own setting.
      published: in per cent; None where the paper gives no number.
      spread: the published standard deviation, of several runs, or of FLOPs the rounding; None
        for one run.
      unit: accuracy and error are on the test set; FLOPs are the costliest head's, by those of
        the largest block's layers; distances are `drift.density_distance`.
      quantity: where it is in summary.json, a list has an entry a block; or "input_drift",
        "gradient_sum" or "rate_sum", as in `run_folders.py`.
      block: which block; -1 for the last.
      epoch: after so many epochs of the block's own updates, from metrics.jsonl; None: at the end.
      share: likewise after this share of its updates.
      tail: the mean over the evaluations in this last share of its updates, at least the last one.
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


class Measured(NamedTuple):
    """A mean over seeds and their standard deviation: a sample's, or of one `assumed_spread`.

    `is_whole`: whether each word of the row's `each` has a run.
    """

    mean: float
    deviation: float
    seeds: int
    is_whole: bool = True


class Comparison(NamedTuple):
    """``a - b > by``, in the rows' own unit; both are labels of an item's rows, or numbers."""

    a: str | float
    b: str | float
    by: float = 0.0

    def __str__(self) -> str:
        return f"({self.a}) − ({self.b}) > {self.by:g}"


class Claim(NamedTuple):
    """What a paper says, the item it rests on, and comparisons that decide it (see `decide`)."""

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


def assumed_spread(row: Row, is_reduced: bool = False) -> float:
    """The standard deviation of a row's single seed, at the full or a reduced setting."""
    if row.unit == FLOPS or row.quantity == "rate_sum":
        return 0.0
    if row.unit == DISTANCE:
        return DISTANCE_SPREAD
    if row.epoch is not None or row.share is not None:
        return EARLY_SPREAD
    return REDUCED_SPREAD if is_reduced else SPREAD


def compare(
    comparison: Comparison, measured: Mapping[str, Measured]
) -> tuple[str, float | None, float | None]:
    """Decides ``a - b > by`` by the difference against twice its standard error.

    Args:
      comparison: what is compared.
      measured: by the row's label; a row that was not run is missing.

    Returns:
      The verdict, a - b, and twice its standard error. It holds if a - b is above `by` by more than
      this error, and does not hold if it is below by more. Between, the error bars overlap: it is
      not decided; nor is it if a row has no run yet for some of its words.
    """
    a, b = (measured.get(x) if isinstance(x, str) else Measured(x, 0.0, 1) for x in comparison[:2])
    if a is None or b is None:
        return NOT_RUN, None, None
    difference = a.mean - b.mean
    error = 2 * math.sqrt(a.deviation**2 / a.seeds + b.deviation**2 / b.seeds)
    if abs(difference - comparison.by) <= error or not (a.is_whole and b.is_whole):
        return UNDECIDED, difference, error
    return HOLDS if difference > comparison.by else FAILS, difference, error


def decide(claim: Claim, measured: Mapping[str, Measured]) -> str:
    """Holds if all comparisons do, does not hold if one does not, not run if none was run.

    Not decided otherwise: some are not decided, or some were not run.
    """
    verdicts = {compare(comparison, measured)[0] for comparison in claim.comparisons}
    if FAILS in verdicts:
        return FAILS
    return verdicts.pop() if len(verdicts) == 1 else UNDECIDED


# fmt: off
# ---- DGL (Belilovsky, Eickenberg, Oyallon, ICML 2020).

_FIGURE2 = {  # At the end, after 50 and 200 epochs.
    "backprop": (84.6, 74.0, 80.6), "DGL": (85.1, 74.4, 79.7),
    "cDNI": (81.1, 69.2, 76.3), "DNI": (62.0, 41.7, 52.8),
}
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

_DGL = (
    Item("DGL", "Proposition 3.1", "inputs that come to rest, and gradients that fall", 3,
         "Figures 3 and 4's runs. Distance: of the density of a block's inputs from the final one, "
         "c_t in the paper, by channel on a probe batch. Part: of the sum over steps of the "
         "learning rate times the squared norm of the block's gradient, that of a mini-batch, "
         "whose noise stays; beside it, of the sum of the learning rates alone, which is what a "
         "constant norm would give. After a share of the block's own updates.",
         (*(Row(f"{method}, inputs of block {block}, after {words}", f"figure34.py:{method.lower()}",
                unit=DISTANCE, quantity="input_drift", block=block, share=share, short=_SHORTER)
            for method, shares in (("DGL", _SHARES), ("sequential", ("a tenth",)))
            for block in (1, 2, 3) for words, share in _SHARES.items() if words in shares),
          *(Row(f"{method}, sum of block {block}, after a half", f"figure34.py:{method.lower()}",
                unit=PART, quantity="gradient_sum", block=block, share=0.5, short=_SHORTER)
            for method in ("DGL", "sequential") for block in range(4)),
          *(Row(f"{method}, rates alone, after a half", f"figure34.py:{method.lower()}",
                unit=PART, quantity="rate_sum", share=0.5, short=_SHORTER)
            for method in ("DGL", "sequential")))),
    Item("DGL", "Figure 2", "synthetic gradients against DGL and backprop, CIFAR-10", 1,
         "Published: the official logs, one seed. At the end both are means over the last ten of "
         "1,500 epochs.",
         tuple(Row(f"{method}, after {epoch} epochs" if epoch else method,
                   f"figure2.py:{method.lower()}", values[place], epoch=epoch,
                   tail=None if epoch else 10 / 1500, short=() if epoch else ("short",))
               for place, epoch in enumerate((None, 50, 200))
               for method, values in _FIGURE2.items())),
    Item("DGL", "Figures 3 and 4", "learning curves of a four-layer network, CIFAR-10", 3,
         "Published: the official logs, one seed; the text says six layers, code and logs have "
         "four. Epochs are a block's own: sequential training takes four times as many in all. Three "
         "tenths are 15 of 50 epochs, where the rate first drops: the last evaluation up to there.",
         (*(Row(f"{method}, block {block}", f"figure34.py:{method.lower()}", value, block=block,
                short=_SHORTER)
            for method, values in _FIGURE34.items() for block, value in enumerate(values)),
          *(Row(f"{method}, block 3, after three tenths", f"figure34.py:{method.lower()}", value,
                block=3, share=0.3, short=_SHORTER)
            for method, value in (("DGL", 76.2), ("sequential", 85.5))),
          Row("backprop", "figure34.py:backprop", short=_SHORTER))),
    Item("DGL", "Table 1", "three auxiliary heads on a six-layer network, CIFAR-10", 3,
         "FLOPs: the costliest head's by those of the largest block's layers. The paper's 0.7 and "
         "4.0 % are not the costliest heads'; by arithmetic those have 8.3 and 10.4 %.",
         (*(Row(f"{head}-aux", f"table1.py:{word}", top1)
            for head, (word, top1, _, _) in _TABLE1.items()),
          *(Row(f"{head}-aux, FLOPs", f"table1.py:{word}", flops, rounding, unit=FLOPS,
                quantity="aux_flops_ratio")
            for head, (word, _, flops, rounding) in _TABLE1.items()))),
    Item("DGL", "Figure 5", "asynchronous DGL, one block slowed down by S, CIFAR-10", 3,
         "The paper gives no numbers. A point is the mean over the seeds and the six blocks that "
         "are slowed down, or those of them that ran; at S = 1.0 none is.",
         (Row("synchronous DGL", "figure5.py:dgl"), Row("S = 1.0", "figure5.py:S=1.0"),
          *(Row(f"S = {s / 10}", f"figure5.py:S={s / 10}", each=_SLOWED) for s in range(11, 21)))),
    Item("DGL", "Figure 6", "asynchronous DGL, buffers of M mini-batches, S = 1.2, CIFAR-10", 3,
         "The paper gives no numbers, nor all its values of M. A point is the mean over the seeds "
         "and the six blocks that are slowed down, or those of them that ran.",
         tuple(Row(f"M = {size}", f"figure6.py:M={size}", each=_SLOWED)
               for size in (50, 40, 30, 20, 10, 5, 2, 1))),
    Item("DGL", "Table 2", "ResNet-110 in K = 2 blocks, CIFAR-10", 3,
         "Published: DGL over three seeds; the others quoted there from Huo et al. 2018.",
         (Row("backprop", "table2.py:backprop", 93.53, short=_LONGER),
          Row("DDG", "table2.py:ddg", 93.41, short=_LONGER),
          Row("DGL", "table2.py:dgl", 93.5, spread=0.1, short=_LONGER))),
    Item("DGL", "Table 3", "VGG and ResNet-152, ImageNet", 1,
         "bfloat16 here; the official head of ResNet-152 pools to 2x2 by a slip, ours to 4x4.",
         tuple(Row(f"{label}, top-{k}", f"table3.py:{row[0]}", row[place], quantity=f"test_top{k}")
               for place, k in ((1, 1), (2, 5)) for label, row in _TABLE3.items())),
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
         "variables differ by less than 1e-6 where it counts: chance chose among them.",
         tuple(_sedona("cifar10", f"ResNet-101, {method}, K = {num_blocks}",
                       value if num_blocks == 4 else None, unit=ERROR)
               for num_blocks in (2, 4, 8, 16)
               for method, value in zip(_METHODS[1:], _CIFAR10["ResNet-101"][1:], strict=True))),
    Item("SEDONA", "Ensembles", "SEDONA's last two heads together, K = 4", 3,
         "The slides draw this without numbers; of ImageNet see below.",
         tuple(_sedona("cifar10", f"{network}, SEDONA", unit=ERROR, quantity=quantity,
                       suffix=suffix)
               for network in _CIFAR10
               for quantity, suffix in (("test_top1", ""), ("ensemble_last_top1", ", two heads")))),
    Item("SEDONA", "Tiny-ImageNet", "cuts and heads found on CIFAR-10, K = 4", 1,
         "Published: SEDONA's Table 2 as TRGL, module-wise training with a transport "
         "penalty (NeurIPS 2023), quotes it. PredSim's recipe is not built.",
         tuple(_sedona("tiny_imagenet", f"{network}, {method}", value)
               for network, values in _TINY.items()
               for method, value in zip(("backprop", "DGL", "SEDONA"), values, strict=True))),
    Item("SEDONA", "ImageNet", "cuts and heads found on CIFAR-10", 1,
         "Published: the slides; that of two heads is from Papers with Code. They chose "
         "the best state on the images that they tested on, here it is the last.",
         (*(_sedona("imagenet", f"{network}, {method}", values[place + (k == 5)], unit=ERROR,
                    quantity=f"test_top{k}", suffix=f", top-{k}")
            for k in (1, 5) for network, place in (("ResNet-101", 0), ("ResNet-152", 2))
            for method, values in _IMAGENET.items()),
          _sedona("imagenet", "ResNet-152, SEDONA, K = 4", 20.2, unit=ERROR,
                  quantity="ensemble_last_top1", suffix=", two heads"))),
)

ITEMS = _DGL + _SEDONA

_FALLING = ("after a tenth", "after a half", "after nine tenths")

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
    Claim("DGL is level with sequential training at the end (within 1 %) and behind it early.",
          "Figures 3 and 4",
          (Comparison("DGL, block 3", "sequential, block 3", by=-1.0),
           Comparison("sequential, block 3, after three tenths",
                      "DGL, block 3, after three tenths"))),
    Claim("With DGL each block is better than the one below.",
          "Figures 3 and 4",
          tuple(Comparison(f"DGL, block {k + 1}", f"DGL, block {k}") for k in range(3))),
    Claim("MLP-SR-aux lies between MLP-aux and CNN-aux.",
          "Table 1", (Comparison("MLP-SR-aux", "MLP-aux"), Comparison("CNN-aux", "MLP-SR-aux"))),
    Claim("MLP-SR-aux takes a few per cent of the FLOPs: less than 5 % of the largest block's.",
          "Table 1", (Comparison(5.0, "MLP-SR-aux, FLOPs"),)),
    Claim("Accuracy is kept up to S = 1.2 (within 0.5 % of synchronous DGL) and falls little at "
          "S = 2.0 (within 2 %).",
          "Figure 5",
          (*(Comparison(f"S = {s}", "synchronous DGL", by=-0.5) for s in ("1.0", "1.1", "1.2")),
           Comparison("S = 2.0", "synchronous DGL", by=-2.0))),
    Claim("The buffer's size matters little: a tiny one is within 1 % of M = 50.",
          "Figure 6", tuple(Comparison(f"M = {size}", "M = 50", by=-1.0) for size in (5, 2, 1))),
    Claim("DGL is level with backprop and DDG at K = 2 (within 0.5 %).",
          "Table 2", tuple(Comparison("DGL", other, by=-0.5) for other in ("backprop", "DDG"))),
    Claim("SEDONA's cuts and heads beat uniform cuts with DGL's heads: lower errors at K = 4.",
          "CIFAR-10",
          tuple(Comparison(f"{network}, DGL", f"{network}, SEDONA") for network in _CIFAR10)),
)
