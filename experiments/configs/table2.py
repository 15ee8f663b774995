"""DGL, Table 2: ResNet-110 in two blocks by DGL, DDG and backprop, on CIFAR-10.

    python experiments/train.py --config=experiments/configs/table2.py:ddg \
        --workdir=runs/table2_ddg --config.data.data_dir=TFDS_DIR

Words: dgl, ddg, backprop (the method); K=2, K=4 (blocks).

Expected (the paper, K = 2; the last two quoted there from Huo et al. 2018): dgl 93.5 +- 0.1 %
over three seeds, ddg 93.41 %, backprop 93.53 %. K = 4 is the other half of the paper's timing:
DGL 5 % (K = 2) and 18 % (K = 4) faster than DDG on as many GPUs; neither its code nor an accuracy
at K = 4 was published. To time it here add --config.placement.kind=pipelined.

The cut is the one of DDG's code: 58 modules (stem of three, 54 residual blocks, the head) in
equal parts, rounded up, so 26 residual blocks below the cut; at K = 4 by the same rule.

Known differences: DDG's code drops the rate and keeps momentum, and has Nesterov's, which
ours has for ddg and backprop; DGL's code makes new optimizers, without Nesterov's, at the start
of epochs 149 and 224 counted from 0, ours at the paper's 150 and 225. An epoch leaves out its
last, partial batch. DDG's gradients are taken at the weights of their forward pass, as in its
paper; --config.method.weights=current takes them as its code does.
"""

from dgl_jax.config import default_config
from dgl_jax.data.statistics import DGL_CIFAR10_STD
from dgl_jax.variants import choose_words

WORDS = (("dgl", "ddg", "backprop"), ("K=2", "K=4"))


def get_config(variant: str = ""):
    method, blocks = choose_words(variant, WORDS)
    config = default_config()
    config.method.name = method
    config.network.name = "resnet110"
    config.partition.strategy = "explicit"
    config.partition.cuts = {"K=2": (25,), "K=4": (11, 26, 41)}[blocks]
    config.auxiliary.name = "mlp_sr"
    config.data.name = "cifar10"
    config.data.crop_padding = 4
    config.data.std = DGL_CIFAR10_STD
    config.train.batch_size = 128
    config.train.num_epochs = 300.0
    config.optimizer.learning_rate = 0.01
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.optimizer.schedule = "step"
    config.optimizer.drop_epochs = (150.0, 225.0)
    config.optimizer.drop_factor = 0.1
    if method == "dgl":
        config.optimizer.momentum_at_drop = "reset"
    else:
        config.optimizer.nesterov = True
    return config
