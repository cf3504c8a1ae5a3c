from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from losslab.errors import LosslabError
from losslab.tasks import Splits, Task, build, check, cifar10, cifar10_task, digits, load_task, mnist
from losslab.tasks.sources import _decode, _tables

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"

needs_mnist = pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="no ../shared/data/mnist")
needs_cifar = pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="no ../shared/data/cifar10")


def rows(x: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


def standardised(splits: Splits, axes: tuple[int, ...]) -> None:
    """The training split has mean 0 and deviation 1 over the axes, the others are on its scale."""
    x = splits.train.all()[0].double()
    assert x.mean(axes).abs().max() < 1e-5
    assert ((x.std(axes, correction=0) - 1).abs() < 1e-4).all()
    for split in splits[1:]:
        assert 0 < split.all()[0].double().mean(axes).abs().max() < 0.5


def test_digits_splits_are_stratified_and_disjoint() -> None:
    splits = digits(raw=True)
    assert [len(split) for split in splits] == [1000, 297, 500]
    assert Splits._fields == ("train", "validation", "test")
    from sklearn.datasets import load_digits

    everything = torch.from_numpy(load_digits().data.astype(np.float32))
    x = torch.cat([split.all()[0] for split in splits])
    assert x.dtype == torch.float32
    assert len(rows(x)) == len(rows(everything)) == 1797
    assert rows(x) == rows(everything)
    total = torch.cat([split.all()[1] for split in splits]).bincount() / 1797
    for split in splits:
        y = split.all()[1]
        assert y.dtype == torch.int64
        assert (y.bincount(minlength=10) - total * len(y)).abs().max() < 2


def test_digits_are_standardised_by_the_training_split_alone() -> None:
    raw, scaled = digits(raw=True), digits()
    x = raw.train.all()[0].double().numpy()
    mean, spread = x.mean(0), x.std(0)
    for one, other in zip(raw, scaled, strict=True):
        expected = (one.all()[0].double().numpy() - mean) / np.where(spread > 0, spread, 1)
        np.testing.assert_allclose(other.all()[0].numpy(), expected, atol=1e-5)
        assert torch.equal(one.all()[1], other.all()[1])
    constant = spread == 0
    assert constant.sum() >= 3
    assert (scaled.train.all()[0][:, constant] == 0).all()


def test_digits_are_always_the_same_and_draw_nothing_global() -> None:
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = digits(), digits(image=True)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (np.random.get_state()[1] == state[1]).all()
    assert two.test.all()[0].shape == (500, 1, 8, 8)
    assert torch.equal(one.train.all()[0], two.train.all()[0].flatten(1))


@pytest.fixture(scope="module")
def mnist_task() -> Task:
    return load_task("mnist", folder=SHARED)


@needs_mnist
def test_the_ready_task_is_lenet_on_mnist(mnist_task: Task) -> None:
    assert repr(mnist_task.model).startswith("mlp(784, 300, 100, 10")
    check(mnist_task, build(mnist_task))


@needs_mnist
def test_mnist_is_the_original() -> None:
    images, labels = _decode(_tables("mnist", "ylecun/mnist", SHARED / "mnist")[1], "image", "label", "L")
    header = b"".join(number.to_bytes(4, "big") for number in (2051, 10_000, 28, 28))
    assert hashlib.md5(header + images.numpy().tobytes()).hexdigest() == "2646ac647ad5339dbf082846283269ea"
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]


@needs_mnist
def test_mnist_splits(mnist_task: Task) -> None:
    mnist_splits = Splits(mnist_task.train, mnist_task.validation, mnist_task.test)
    assert [len(split) for split in mnist_splits] == [55_000, 5_000, 10_000]
    x, y = mnist_splits.train.all()
    assert (x.shape, x.dtype, y.dtype) == ((55_000, 784), torch.float32, torch.int64)
    assert x.is_contiguous()
    standardised(mnist_splits, (0, 1))
    # 10 classes of the 60,000, as they are known: the validation examples are missing from no class.
    both = torch.cat([y, mnist_splits.validation.all()[1]]).bincount()
    assert both.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist_splits.validation.all()[1].bincount().min() > 400
    assert not rows(x[:3000]) & rows(mnist_splits.validation.all()[0])


@needs_mnist
def test_mnist_leaves_its_folder_as_it_was(tmp_path: Path) -> None:
    folder = small(SHARED / "mnist", tmp_path / "mnist", 200)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    folder.chmod(0o555)
    try:
        mnist(tmp_path, validation=20)
    finally:
        folder.chmod(0o755)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before


def small(source: Path, target: Path, n: int, shards: int = 1) -> Path:
    """The first n rows of each split, the training ones in several files."""
    from pyarrow import parquet

    target.mkdir()
    for split, count in (("train", shards), ("test", 1)):
        table = parquet.read_table(next(source.glob(f"{split}-*.parquet"))).slice(0, n)
        for k in range(count):
            part = table.slice(k * n // count, n // count)
            parquet.write_table(part, target / f"{split}-{k:05}-of-{count:05}.parquet")
    return target


@needs_mnist
def test_mnist_binarised_and_as_images(tmp_path: Path) -> None:
    folder = small(SHARED / "mnist", tmp_path / "mnist", 300)
    black = mnist(folder, validation=50, binarise=True, image=True)
    assert black.train.all()[0].shape == (250, 1, 28, 28)
    assert set(black.train.all()[0].unique().tolist()) == {0.0, 1.0}
    grey = mnist(folder, validation=50)
    assert torch.equal(grey.train.all()[1], black.train.all()[1])
    # Standardising keeps the order of the values: one threshold separates the two kinds of pixels.
    ink = black.train.all()[0].flatten(1).bool()
    assert grey.train.all()[0][ink].min() > grey.train.all()[0][~ink].max()


@needs_cifar
def test_cifar10_is_standardised_by_channel_over_its_files(tmp_path: Path) -> None:
    from PIL import Image
    from pyarrow import parquet

    folder = small(SHARED / "cifar10", tmp_path / "cifar10", 1200, shards=3)
    assert len(list(folder.glob("train-*"))) == 3
    splits = cifar10(tmp_path, validation=200)
    assert [len(split) for split in splits] == [1000, 200, 1200]
    assert splits.train.all()[0].shape == (1000, 3, 32, 32)
    standardised(splits, (0, 2, 3))
    # The order of the test images is kept, and their pixels are those of an independent decoding.
    first = parquet.read_table(next(folder.glob("test-*"))).slice(0, 1).to_pylist()[0]
    pixels = np.asarray(Image.open(io.BytesIO(first["img"]["bytes"])).convert("RGB"), dtype=np.float64)
    got = splits.test.all()[0][0].double().numpy()
    for channel in range(3):
        slope, offset = np.polyfit(pixels[:, :, channel].ravel(), got[channel].ravel(), 1)
        np.testing.assert_allclose(got[channel], slope * pixels[:, :, channel] + offset, atol=1e-4)
        assert slope > 0
    assert splits.test.all()[1][0] == first["label"]
    flat = cifar10(tmp_path, validation=200, image=False)
    assert torch.equal(flat.train.all()[0], splits.train.all()[0].flatten(1))


@needs_cifar
def test_the_ready_task_is_conv2_on_cifar10(tmp_path: Path) -> None:
    small(SHARED / "cifar10", tmp_path / "cifar10", 5100)
    task = cifar10_task(folder=tmp_path)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [100, 5000, 5100]
    check(task, build(task))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(LosslabError, match=r"there is no data folder .*nowhere: pass an existing one"):
        mnist(tmp_path / "nowhere")
    with pytest.raises(
        LosslabError, match=r"holds train-\*.parquet and test-\*.parquet: put .* uoft-cs/cifar10"
    ):
        cifar10(tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"{split}-0.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(LosslabError, match=r"cannot be read .*: fetch it again"):
        mnist(tmp_path)


def test_a_table_of_something_else(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    tables = [
        {"text": ["a"], "label": [1]},
        {"image": ["a"], "label": [1]},
        {"image": [{"bytes": b"no image", "path": ""}], "label": [1]},
    ]
    for table in tables:
        for split in ("train", "test"):
            parquet.write_table(pa.table(table), tmp_path / f"{split}-0.parquet")
        with pytest.raises(LosslabError, match="the table does not hold images in 'image'"):
            mnist(tmp_path)


@needs_mnist
@pytest.mark.parametrize("validation", [0, 200, -1])
def test_validation_leaves_examples(tmp_path: Path, validation: int) -> None:
    with pytest.raises(LosslabError, match=f"validation is {validation}, of 200 training examples"):
        mnist(small(SHARED / "mnist", tmp_path / "mnist", 200), validation=validation)


def test_the_extra_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        LosslabError, match=r"needs datasets, which is not installed: .*pip install 'losslab\[data\]'"
    ):
        load_task("mnist")


def test_the_hub_out_of_reach(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    code = "from losslab.tasks import cifar10; cifar10()"
    surroundings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | surroundings, capture_output=True, text=True
    )
    assert "LosslabError: the Hugging Face hub did not give uoft-cs/cifar10" in ran.stderr
    assert "pass --data DIR" in ran.stderr


def test_importing_the_room_is_cheap() -> None:
    code = (
        "import sys, losslab.tasks\n"
        "heavy = {'pandas', 'scipy', 'sklearn', 'plotly', 'datasets', 'pyarrow', 'rich', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    surroundings = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "[]"
