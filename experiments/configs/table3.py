"""DGL, Table 3: VGG-13, VGG-19 and ResNet-152 on ImageNet, by DGL and by backprop.

    python experiments/train.py --config=experiments/configs/table3.py:vgg19_K=4 \
        --workdir=runs/table3_vgg19_K4 --config.data.data_dir=TFDS_DIR

Words: vgg13_K=10, vgg13_K=4, vgg13_backprop, vgg19_K=4, vgg19_K=2, vgg19_backprop,
resnet152_K=2, resnet152_backprop.

Expected (the paper; 50 epochs; top-1 / top-5 accuracy of the last block, %):

    vgg13_K=10 64.4 / 85.8    vgg13_K=4 67.8 / 88.0    vgg13_backprop     66.6 / 87.5
    vgg19_K=4  69.2 / 89.0    vgg19_K=2 70.8 / 90.2    vgg19_backprop     69.7 / 89.7
                          resnet152_K=2 74.5 / 92.0    resnet152_backprop 74.4 / 92.1

And what they cost (the paper's Table 4; 10^9 multiply-adds an image, of the network and of the
heads): vgg13_K=4 13 / 0.2, vgg19_K=4 20 / 0.2, resnet152_K=2 11 / 0.02.

The cuts are those of the official code: every 1, 3, 4 or 8 convolutions (VGG-13 at K = 4 is
3, 3, 3 and 1), and after the 25th bottleneck of ResNet-152. As there, the heads of VGG have
dropout in the backprop rows only, which are torchvision's networks.

Known differences: bfloat16 instead of float16 with a loss scale; an epoch leaves out its last,
partial batch; heads start as torch's layers do, there from He's normal by fan-out and N(0, 0.01).
The official backprop counts epochs from 1, so that its rate drops one epoch earlier. The official
MLP-SR head of ResNet-152 pools 14x14 to 2x2 by a slip before its 1x1 convolutions; ours to 4x4.
"""

from dgl_jax.config import default_config
from dgl_jax.variants import choose_words

_CUTS = {
    "vgg13_K=10": tuple(range(9)),
    "vgg13_K=4": (2, 5, 8),
    "vgg13_backprop": (),
    "vgg19_K=4": (3, 7, 11),
    "vgg19_K=2": (7,),
    "vgg19_backprop": (),
    "resnet152_K=2": (24,),
    "resnet152_backprop": (),
}
WORDS = (tuple(_CUTS),)


def get_config(variant: str = ""):
    (row,) = choose_words(variant, WORDS)
    config = default_config()
    config.network.name, _, blocks = row.partition("_")
    config.network.form = "imagenet"
    config.network.dtype = "bfloat16"
    config.method.name = "backprop" if blocks == "backprop" else "dgl"
    if blocks == "backprop" and config.network.name != "resnet152":
        config.network.dropout = 0.5
    config.partition.strategy = "explicit"
    config.partition.cuts = _CUTS[row]
    config.auxiliary.name = "mlp_sr"
    config.data.name = "imagenet2012"
    config.data.image_size = 224
    config.train.batch_size = 256
    config.train.num_epochs = 50.0
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.optimizer.schedule = "step"
    config.optimizer.drop_epochs = (10.0, 20.0, 30.0, 40.0)
    config.optimizer.drop_factor = 0.1
    config.optimizer.momentum_at_drop = "reset"
    return config
