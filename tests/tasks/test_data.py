from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from losslab.errors import LosslabError
from losslab.tasks import Data, leaves, map_nest

Pair = namedtuple("Pair", ["left", "right"])


def tensors(n: int) -> st.SearchStrategy[torch.Tensor]:
    shapes = st.lists(st.integers(1, 3), max_size=2)
    return shapes.map(lambda tail: torch.randn(n, *tail, generator=torch.Generator().manual_seed(n)))


def nests(n: int) -> st.SearchStrategy[object]:
    return st.recursive(
        tensors(n),
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3)
            | st.tuples(inner, inner)
            | st.builds(Pair, inner, inner)
            | st.dictionaries(st.sampled_from("abc"), inner, min_size=1)
            | st.tuples(inner, st.sampled_from([None, 7, 2.5]))
        ),
        max_leaves=6,
    )


def same(a: object, b: object) -> bool:
    """Equality of nests by structure, type, dtype and bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(deadline=None)
@given(nests(3))
def test_map_nest_with_the_identity_gives_the_nest_back(nest: object) -> None:
    assert same(map_nest(lambda leaf: leaf, nest), nest)


@settings(deadline=None)
@given(nests(3))
def test_map_nest_composes(nest: object) -> None:
    once = map_nest(lambda leaf: (leaf + 1) * 2, nest)
    twice = map_nest(lambda leaf: leaf * 2, map_nest(lambda leaf: leaf + 1, nest))
    assert same(once, twice)


@settings(deadline=None)
@given(nests(2))
def test_map_nest_zips_its_nests(nest: object) -> None:
    tripled = map_nest(lambda a, b, c: a + b + c, nest, nest, nest)
    assert all(torch.allclose(t, 3 * leaf) for t, leaf in zip(leaves(tripled), leaves(nest), strict=True))


def test_other_mappings_become_dicts_that_vmap_takes() -> None:
    batch = map_nest(lambda leaf: leaf, UserDict(ids=torch.arange(6).view(3, 2), note=None))
    assert type(batch) is dict
    assert batch["note"] is None
    del batch["note"]
    assert torch.func.vmap(lambda b: b["ids"].sum())(batch).tolist() == [1, 5, 9]
    assert type(map_nest(lambda leaf: leaf, OrderedDict(a=torch.ones(1)))) is OrderedDict


@pytest.mark.parametrize(
    ("nest", "other"),
    [
        ((torch.ones(1), torch.ones(1)), (torch.ones(1),)),
        ({"a": torch.ones(1)}, {"b": torch.ones(1)}),
        ({"a": torch.ones(1)}, [torch.ones(1)]),
        ([torch.ones(1)], torch.ones(1)),
    ],
)
def test_map_nest_refuses_other_structures(nest: object, other: object) -> None:
    with pytest.raises(LosslabError, match="two nests differ"):
        map_nest(torch.add, nest, other)


@settings(deadline=None)
@given(st.data())
def test_take_is_indexing(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 6))
    source = data.draw(nests(n))
    shape = data.draw(st.sampled_from([(4,), (1,), (2, 3), (1, 5)]))
    numbers = data.draw(st.lists(st.integers(0, n - 1), min_size=15, max_size=15))
    index = torch.tensor(numbers[: torch.Size(shape).numel()]).view(shape)
    taken = Data.of(source).take(index)
    assert same(taken, map_nest(lambda leaf: leaf[index], source))
    assert all(leaf.is_contiguous() for leaf in leaves(taken))


def test_take_is_contiguous_for_a_transposed_source() -> None:
    x = torch.arange(12.0).view(3, 4).T
    taken = Data.of(x).take(torch.tensor([3, 0]))
    assert taken.is_contiguous()
    assert torch.equal(taken, x[[3, 0]])


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 12).filter(bool))
def test_head_and_len(n: int, k: int) -> None:
    data = Data.of({"x": torch.arange(n), "y": torch.arange(2.0 * n).view(n, 2)})
    assert len(data) == n
    assert len(data.head(k)) == min(n, k)
    assert torch.equal(data.head(k).all()["x"], torch.arange(min(n, k)))


def test_to_changes_floating_tensors_only() -> None:
    data = Data.of((torch.ones(2), torch.tensor([1, 2]), torch.ones(2, dtype=torch.float64)))
    assert [leaf.dtype for leaf in leaves(data.to(dtype=torch.float64).all())] == [
        torch.float64,
        torch.int64,
        torch.float64,
    ]
    assert [leaf.device.type for leaf in leaves(data.to("meta").all())] == ["meta"] * 3


def test_numpy_arrays_become_tensors_also_when_read_only() -> None:
    frozen = np.arange(3)
    frozen.flags.writeable = False
    data = Data.of({"x": np.ones((3, 2), dtype=np.float32), "y": frozen})
    assert data.all()["x"].dtype == torch.float32
    assert torch.equal(data.all()["y"], torch.arange(3))


def test_data_have_no_gradient_and_stay_as_they_are() -> None:
    data = Data.of(torch.ones(3, requires_grad=True))
    assert not data.all().requires_grad
    assert Data.of(data) is data
    with pytest.raises(AttributeError):
        data.examples = torch.zeros(1)  # type: ignore[misc]


class Squares(Dataset):
    """Examples (float vector, label), drawing from the global random state as an augmentation would."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        if not 0 <= i < self.n:
            raise IndexError(i)
        torch.rand(1)
        return torch.tensor([float(i), float(i * i)]), i % 3


class Counter(IterableDataset):
    def __iter__(self):
        return iter(range(7))


EXPECTED = (torch.tensor([[float(i), float(i * i)] for i in range(10)]), torch.arange(10) % 3)


@pytest.mark.parametrize(
    "source",
    [
        Squares(10),
        Subset(Squares(12), range(10)),
        TensorDataset(*EXPECTED),
        DataLoader(Squares(10), batch_size=4),
        DataLoader(Squares(10), batch_size=4, shuffle=True),
        DataLoader(Squares(10), batch_size=4, shuffle=True, drop_last=True),
        DataLoader(Squares(12), batch_size=5, sampler=SubsetRandomSampler([*range(9, -1, -1)])),
        DataLoader(Squares(10), sampler=RandomSampler(range(10), replacement=True, num_samples=3)),
        DataLoader(TensorDataset(EXPECTED[0].view(5, 2, 2), EXPECTED[1].view(5, 2)), batch_size=None),
    ],
    ids=lambda source: type(source).__name__,
)
def test_every_source_is_read_once_in_order(source: object) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    examples = Data.of(source).all()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, examples, EXPECTED))


def test_a_large_dataset_is_joined_from_chunks() -> None:
    x, y = Data.of(Squares(9000)).all()
    assert torch.equal(x[:, 0], torch.arange(9000.0))
    assert torch.equal(y, torch.arange(9000) % 3)


def test_a_loader_over_an_iterable_dataset_is_read_through() -> None:
    assert Data.of(DataLoader(Counter(), batch_size=3)).all().tolist() == list(range(7))


def test_the_loaders_own_collate_is_used_and_pads_to_one_length() -> None:
    words = [torch.arange(k) for k in (1, 4, 2)]

    def pad(items: list[torch.Tensor]) -> UserDict:
        return UserDict(ids=torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=-1))

    ids = Data.of(DataLoader(words, batch_size=2, collate_fn=pad)).all()["ids"]  # type: ignore[arg-type]
    assert ids.tolist() == [[0, -1, -1, -1], [0, 1, 2, 3], [0, 1, -1, -1]]


def test_hugging_face_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"tokens": [[1, 2], [3, 4], [5, 6]], "weight": [0.5, 1.0, 2.0]}
    data = Data.of(datasets.Dataset.from_dict(columns))
    assert data.all()["tokens"].tolist() == columns["tokens"]
    assert data.all()["weight"].tolist() == columns["weight"]
    text = datasets.Dataset.from_dict({"text": ["a", "b"]})
    with pytest.raises(LosslabError, match=r"data\['text'\]\[0\] is a str"):
        Data.of(text)
    with pytest.raises(LosslabError, match=r"data\['train'\] is a Dataset"):
        Data.of(datasets.DatasetDict(train=text))
    ragged = datasets.Dataset.from_dict({"tokens": [[1], [2, 3]]})
    with pytest.raises(LosslabError, match="disagree on the number of examples"):
        Data.of(ragged)


class Ragged(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.ones(i + 1)


class Text(Squares):
    def __getitem__(self, i: int) -> dict[str, object]:
        return {"x": float(i), "name": "abc"}


class Endless(Dataset):
    def __getitem__(self, i: int) -> int:
        return i


WEIGHTED = WeightedRandomSampler([1.0] * 10, 10)

BAD = {
    "no tensor": (None, "the data hold no tensor, only a NoneType"),
    "an empty dict": ({}, "the data hold no tensor, only a dict"),
    "no example": ((torch.ones(0, 2), torch.ones(0)), "the data are empty"),
    "an empty dataset": (Squares(0), "the data are empty"),
    "an empty loader": (DataLoader(Squares(0), collate_fn=list), "the data are empty"),
    "a number": ((torch.ones(3), torch.tensor(1.0)), r"data\[1\] is a single number"),
    "ragged": ({"x": torch.ones(3), "y": torch.ones(2)}, r"data\['x'\] has 3, data\['y'\] has 2"),
    "an unknown kind": (object(), "data is a object: give a tensor"),
    "a path": ("data.csv", "data is a str"),
    "a generator": ((i for i in range(3)), "data is a generator"),
    "an array of objects": (np.array([object()]), "an array of object"),
    "ragged examples": (Ragged(), "the examples of Ragged do not make a batch"),
    "text": (Text(3), r"data\['name'\]\[0\] is a str"),
    "no length": (Endless(), "Endless has no length"),
    "an iterable": (Counter(), "data is a Counter"),
    "a sampler that repeats": (DataLoader(Squares(10), sampler=WEIGHTED), "with a WeightedRandomSampler"),
    "a batch sampler": (
        DataLoader(
            Squares(10),
            batch_sampler=type("Mine", (BatchSampler,), {})(SequentialSampler(range(9)), 3, False),
        ),
        "with a Mine",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sources(name: str) -> None:
    source, message = BAD[name]
    with pytest.raises(LosslabError, match=message):
        Data.of(source)


def test_items_that_are_batches_join_whatever_their_length() -> None:
    assert len(Data.of(DataLoader(Ragged(), batch_size=None))) == 1 + 2 + 3


def test_batches_of_other_shapes_do_not_join() -> None:
    class Widening(IterableDataset):
        def __iter__(self):
            return iter([torch.ones(2, 3), torch.ones(2, 4)])

    with pytest.raises(LosslabError, match="the batches do not join"):
        Data.of(DataLoader(Widening(), batch_size=None))


def test_repr_is_short() -> None:
    assert repr(Data.of((torch.ones(5, 2), torch.arange(5)))) == "Data(5 examples of float32 [2], int64 [])"
