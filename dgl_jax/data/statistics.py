"""The mean and standard deviation by which a set's images are normalised."""

import numpy as np

from dgl_jax.errors import UserError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

_FASHION_MNIST = ((0.28604,), (0.35302,))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Of pixels scaled to [0, 1], over the whole training set.
PUBLISHED: dict[str, Statistics] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "embedded": _FASHION_MNIST,
    "fashion_mnist": _FASHION_MNIST,
    "imagenet2012": IMAGENET,
    "imagenette": IMAGENET,
    "mnist": ((0.1307,), (0.3081,)),
    "svhn_cropped": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}

# The official DGL code divides CIFAR-10 by these, which are means of each image's own deviation
# and not the set's: pass them as ``std`` to repeat its runs.
DGL_CIFAR10_STD = (0.2023, 0.1994, 0.2010)


def choose(
    name: str,
    channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    images: np.ndarray | None,
) -> Statistics:
    """The statistics to normalise by: the user's, else the published ones, else the images' own.

    Args:
      name: the set's name; a configuration after "/" is ignored.
      channels: of its images.
      mean: the user's, one number a channel, or ().
      std: the user's, or ().
      images: uint8 [N, H, W, C], the stored training images; None if they are streamed, when
        ImageNet's statistics stand in for unpublished ones.

    Returns:
      (mean, std), each of `channels` numbers.

    Example:
      >>> choose("cifar10", channels=3, mean=(), std=DGL_CIFAR10_STD, images=None)
      ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201))

    Raises:
      UserError: if the user's have another length or a std is not positive.
    """
    mean, std = tuple(mean), tuple(std)
    for key, value in (("mean", mean), ("std", std)):
        if value and len(value) != channels:
            raise UserError(
                f"{key}={value} must have {channels} numbers, one a channel of {name};"
                f" leave it empty for the set's own"
            )
    if any(value <= 0 for value in std):
        raise UserError(f"std={std} must be positive; leave it empty for the set's own")
    if mean and std:
        return mean, std
    own = PUBLISHED.get(name.split("/")[0])
    if own is None or len(own[0]) != channels:
        if images is not None:
            own = of_images(images)
        elif channels == 3:
            own = IMAGENET
        else:
            raise UserError(
                f"mean={mean} must be given, with std, for name={name} streamed with {channels}"
                f" channels; try mean=({', '.join(['0.5'] * channels)},)"
            )
    return mean or own[0], std or own[1]


def of_images(images: np.ndarray) -> Statistics:
    """Exact mean and standard deviation a channel of uint8 images [N, H, W, C]; a constant
    channel gets 1."""
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in range(images.shape[-1]):
        counts = np.zeros(256, np.int64)
        for start in range(0, len(images), 4096):  # bincount makes a copy of 8 bytes a pixel
            counts += np.bincount(images[start : start + 4096, ..., channel].ravel(), minlength=256)
        mean = float(np.average(values, weights=counts))
        variance = float(np.average((values - mean) ** 2, weights=counts))
        means.append(mean)
        stds.append(variance**0.5 or 1.0)
    return tuple(means), tuple(stds)
