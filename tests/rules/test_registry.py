"""Names, pages, and the sentences for bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from losslab import LosslabError
from losslab.rules import RULES, AdaGrad, Adam, FullAdaGrad, Newton, Rule, make, page, schedules, table


def test_every_rule_tells_about_itself() -> None:
    assert list(RULES)[:4] == ["gd", "sgd", "momentum", "nesterov"]
    for name, rule in RULES.items():
        told = page(name)
        assert (told.name, told.title) == (name, rule.title)
        assert all((told.equation, told.source, told.differences))
        assert next(iter(told.defaults)) == "lr"
        assert make(name).name == name
        assert isinstance(make(name), rule)
        if told.variants:
            assert told.defaults["variant"] == next(iter(told.variants))
        text = str(told)
        assert all(part in text for part in (told.title, told.source, told.differences, *told.variants))


def test_the_table_has_a_row_a_rule() -> None:
    rows = table()
    assert [row["name"] for row in rows] == list(RULES)
    assert {tuple(row) for row in rows} == {("name", "title", "variants", "defaults", "source")}
    adam = next(row for row in rows if row["name"] == "adam")
    assert adam["defaults"] == "lr=0.001, beta1=0.9, beta2=0.999, eps=1e-08, eps_root=0"
    assert adam["variants"] == "kingma-ba, lecture, uncorrected"


def test_defaults_that_papers_and_torch_give() -> None:
    assert page("adamax").defaults["lr"] == 2e-3
    assert page("rmsprop").defaults["beta"] == 0.9
    assert page("adagrad").defaults["eps"] == 1e-10
    assert page("newton").defaults["lr"] == 1.0


def test_who_wants_the_whole_training_set() -> None:
    assert {name for name, rule in RULES.items() if rule.full_batch} == {
        "gd",
        "perturbed-gd",
        "newton",
        "newton-cg",
        "saddle-free",
        "cubic-newton",
        "gauss-newton",
    }


bad: list[tuple[Any, str]] = [
    (lambda: make("adm"), "no rule is named 'adm': did you mean 'adam'"),
    (lambda: page("nestrov"), "no rule is named 'nestrov': did you mean 'nesterov'"),
    (lambda: make("zzz"), "no rule is named 'zzz': choose one of gd, sgd, momentum"),
    (lambda: make("adam", leraning_rate=1), "no option of adam is named 'leraning_rate'"),
    (
        lambda: make("sgd", momentum=0.9),
        "no option of sgd is named 'momentum': choose one of lr, weight_decay",
    ),
    (
        lambda: make("adam", variant="keras"),
        "no variant of adam is named 'keras': choose one of kingma-ba, lecture",
    ),
    (lambda: make("amsgrad", variant="papr"), "did you mean 'paper'?"),
    (lambda: Adam(decay="decuopled"), "no weight decay is named 'decuopled': did you mean 'decoupled'?"),
    (lambda: Adam(lr=-0.1), "adam: lr is -0.1, it must be at least 0 and finite: change lr"),
    (lambda: Adam(lr=float("nan")), "adam: lr is nan, it must be at least 0 and finite: change lr"),
    (lambda: Adam(lr=[0.1, float("inf")]), "adam: lr is inf, it must be at least 0 and finite: change lr"),
    (lambda: Adam(beta1=1.0), "adam: beta1 is 1, it must be at least 0 and below 1: change beta1"),
    (lambda: Adam(weight_decay=-1), "adam: weight_decay is -1, it must be at least 0"),
    (lambda: Adam(clip=-1.0), "adam: clip is -1, it must be at least 0"),
    (
        lambda: Adam(lr="fast"),
        "adam: lr is 'fast', no number: pass a number, one number a member, or a schedule",
    ),
    (lambda: Adam(lr=None), "adam: lr is None, no number"),
    (lambda: Adam(lr=True), "adam: lr is True, no number"),
    (lambda: Adam(lr={"a": 1}), "no number: pass a number"),
    (lambda: Adam(lr=torch.ones(2, 2)), "adam: lr has shape (2, 2): pass a scalar or one value per member"),
    (lambda: Adam(lr=[]), "adam: lr has shape (0,): pass a scalar or one value per member"),
    (
        lambda: Adam(lr=[0.1] * 7).check_members(8),
        "lr has shape (7,), the population has 8 members: pass a scalar or one value per member",
    ),
    (
        lambda: Adam(lr=schedules.inverse([0.1] * 7)).check_members(8),
        "lr has shape (7,), the population has 8 members",
    ),
    (
        lambda: Adam(lr=[0.1, 0.2], beta1=[0.9] * 3).members(),
        "lr has 2 values, beta1 has 3 values: give each",
    ),
    (
        lambda: AdaGrad(l1=0.1, variant="lecture"),
        "l1 = 0.1 with variant 'lecture', which has no proximal step",
    ),
    (lambda: AdaGrad(decay="decoupled", variant="dual"), "never reads the current weights"),
    (
        lambda: FullAdaGrad().init({"x": torch.zeros(1, 6000)}),
        "adagrad-full got 6000 weights, whose matrix takes 288,000,000 bytes a member, and is meant for",
    ),
    (
        lambda: Newton().update({}, {}, {"x": torch.zeros(1, 1)}, 0),
        "newton needs the Hessian and got none: pass curvature=",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), bad, ids=[sentence for _, sentence in bad])
def test_bad_input_gets_one_clear_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(LosslabError) as told:
        call()
    assert sentence in str(told.value)
    assert "\n" not in str(told.value)


def test_the_hessian_is_not_asked_for_when_it_would_not_fit() -> None:
    class Never:
        def hessian(self) -> torch.Tensor:
            raise AssertionError

    x = {"x": torch.zeros(1, 5001)}
    with pytest.raises(LosslabError, match=r"200,080,008 bytes"):
        Newton().update(x, {}, x, 0, Never())


def test_a_family_must_write_its_equation() -> None:
    with pytest.raises(NotImplementedError):
        Rule(lr=0.1).leaf(torch.ones(1), torch.ones(1), {}, None, 1)
