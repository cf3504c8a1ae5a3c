"""Real data: scikit-learn's digits, MNIST and CIFAR-10, decoded once into memory."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losslab.errors import LosslabError
from losslab.tasks.data import Data

if TYPE_CHECKING:
    import pyarrow as pa

_SEED = 0  # of every split here, so that all runs see the same examples
_INSTALL = "install it with: pip install 'losslab[data]'"


class Splits(NamedTuple):
    """The same kind of examples, for three purposes."""

    train: Data
    validation: Data
    test: Data


def digits(raw: bool = False, image: bool = False) -> Splits:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels from 0 to 16, split into 1000, 297 and 500.

    The split is stratified by class and always the same. The pixels are standardised with the training
    split's mean and standard deviation, pixel by pixel; those that are constant there become 0 in it.

    Args:
        raw: Keep the values 0 to 16.
        image: Shape ``[n, 1, 8, 8]`` in place of ``[n, 64]``.

    Returns:
        The splits, of pairs (x float32, label int64 from 0 to 9).

    Example:
        >>> [len(split) for split in digits()]
        [1000, 297, 500]
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    rest, test = train_test_split(np.arange(len(y)), test_size=500, stratify=y, random_state=_SEED)
    train, validation = train_test_split(rest, test_size=297, stratify=y[rest], random_state=_SEED)
    if not raw:
        spread = x[train].std(axis=0)
        x = (x - x[train].mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    pixels = torch.from_numpy(x.astype(np.float32)).view(-1, *((1, 8, 8) if image else (64,)))
    labels = torch.from_numpy(y.astype(np.int64))
    return Splits(*(Data((pixels[index], labels[index])) for index in (train, validation, test)))


def mnist(
    folder: str | Path | None = None, validation: int = 5000, image: bool = False, binarise: bool = False
) -> Splits:
    """MNIST: 60,000 and 10,000 grey 28x28 images of digits, with validation examples drawn from the 60,000.

    Args:
        folder: Where the parquet files are, or a folder that holds them in ``mnist/``; the Hugging Face hub's
            ``ylecun/mnist`` if None.
        validation: Examples drawn at random, always the same, from the training images.
        image: Shape ``[n, 1, 28, 28]`` in place of ``[n, 784]``.
        binarise: Pixels 1.0 from half intensity (128) on and 0.0 below, in place of standardised ones.

    Returns:
        The splits, of pairs (x float32, label int64). The pixels are standardised with the one mean and
        standard deviation of the training split.

    Raises:
        LosslabError: If the extra is not installed, the folder or its files are missing, the hub cannot be
            reached, or ``validation`` leaves no example.
    """
    train, test = _tables("mnist", "ylecun/mnist", folder)

    def finish(pixels: Tensor, scale: _Scale) -> Tensor:
        return ((pixels >= 128).float() if binarise else scale(pixels)).view(
            -1, *((1, 28, 28) if image else (784,))
        )

    return _splits(
        _decode(train, "image", "label", "L"), _decode(test, "image", "label", "L"), validation, finish
    )


def cifar10(folder: str | Path | None = None, validation: int = 5000, image: bool = True) -> Splits:
    """CIFAR-10: 50,000 and 10,000 colour 32x32 images of ten classes, with validation drawn from the 50,000.

    Args:
        folder: As for :func:`mnist`, with ``cifar10/``; the hub's ``uoft-cs/cifar10`` if None.
        validation: As for :func:`mnist`.
        image: Shape ``[n, 3, 32, 32]``; ``[n, 3072]`` if false.

    Returns:
        The splits, of pairs (x float32, label int64). The pixels are standardised with the training split's
        mean and standard deviation, channel by channel.

    Raises:
        LosslabError: As for :func:`mnist`.
    """
    train, test = _tables("cifar10", "uoft-cs/cifar10", folder)

    def finish(pixels: Tensor, scale: _Scale) -> Tensor:
        return scale(pixels) if image else scale(pixels).flatten(1)

    return _splits(
        _decode(train, "img", "label", "RGB"), _decode(test, "img", "label", "RGB"), validation, finish
    )


_Scale = Callable[[Tensor], Tensor]
_Pair = tuple[Tensor, Tensor]


def _splits(learn: _Pair, test: _Pair, validation: int, finish: Callable[[Tensor, _Scale], Tensor]) -> Splits:
    """Draw the validation examples, take the scale from the rest, and finish each split's uint8 images."""
    n = len(learn[1])
    if not 0 < validation < n:
        raise LosslabError(
            f"validation is {validation}, of {n} training examples: pass a number between the two"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(_SEED))
    held, kept = order[:validation].sort().values, order[validation:].sort().values
    pairs = [(learn[0][kept], learn[1][kept]), (learn[0][held], learn[1][held]), test]
    scale = _standard(pairs[0][0])
    return Splits(*(Data((finish(pixels, scale), labels)) for pixels, labels in pairs))


def _standard(pixels: Tensor) -> _Scale:
    """The standardisation of uint8 images ``[n, c, h, w]`` by channel, its moments exact from counts."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([pixels[:, c].reshape(-1).bincount(minlength=256) for c in range(pixels.shape[1])])
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ values
    spread = (share @ values.square() - mean.square()).sqrt()
    low, width = (moment.float().view(1, -1, 1, 1) for moment in (mean, spread))
    return lambda images: images.float().sub_(low).div_(width)


def _decode(table: pa.Table, image: str, label: str, mode: str) -> _Pair:
    """The images uint8 ``[n, c, h, w]`` and labels int64 ``[n]`` of a parquet table in the hub's layout."""
    Image = _need("PIL.Image", "pillow")
    try:
        files = table.column(image).combine_chunks().field("bytes")
        labels = torch.tensor(table.column(label).to_pylist(), dtype=torch.int64)
        first = Image.open(io.BytesIO(files[0].as_py())).size
        pixels = np.empty((len(files), *first[::-1], len(mode) if mode != "L" else 1), dtype=np.uint8)
        for row, file in zip(pixels, files.to_pylist(), strict=True):
            row[:] = np.asarray(Image.open(io.BytesIO(file)).convert(mode)).reshape(row.shape)
    except (AttributeError, LookupError, TypeError, ValueError, OSError) as error:
        raise LosslabError(
            f"the table does not hold images in {image!r} and labels in {label!r} ({error}): "
            "give the parquet files of the Hugging Face hub"
        ) from error
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels


def _tables(name: str, hub: str, folder: str | Path | None) -> tuple[pa.Table, pa.Table]:
    """The train and test tables, from the parquet files of a folder or from the hub."""
    if folder is None:
        return _from_hub(hub, "train"), _from_hub(hub, "test")
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise LosslabError(
            f"there is no data folder {root}: pass an existing one, or none to use the Hugging Face hub"
        )
    for place in (root / name, root):
        found = {split: sorted(place.glob(f"{split}-*.parquet")) for split in ("train", "test")}
        if all(found.values()):
            return _read(found["train"]), _read(found["test"])
    raise LosslabError(
        f"neither {root} nor {root / name} holds train-*.parquet and test-*.parquet: "
        f"put the files of the hub's {hub} there"
    )


def _read(files: list[Path]) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    # Not through datasets.load_dataset: that would write a copy of the data into its cache.
    try:
        return pa.concat_tables([parquet.read_table(file) for file in files])
    except (pa.ArrowException, OSError) as error:
        raise LosslabError(
            f"{files[0].parent} holds a parquet file that cannot be read ({error}): fetch it again"
        ) from error


def _from_hub(hub: str, split: str) -> pa.Table:
    datasets = _need("datasets", "datasets")
    try:
        return datasets.load_dataset(hub, split=split).data.table
    except Exception as error:  # the client raises a dozen kinds, by the way the connection fails
        raise LosslabError(
            f"the Hugging Face hub did not give {hub} ({type(error).__name__}): check the connection, "
            "or pass --data DIR with a folder of its parquet files"
        ) from error


def _need(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LosslabError(
            f"reading image data needs {package}, which is not installed: {_INSTALL}"
        ) from error
