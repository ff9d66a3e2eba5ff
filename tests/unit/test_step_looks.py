"""A layer in which replicas do not pay is looked at now and then, until they do."""

from __future__ import annotations

from poise.plan.step_looks import EVERY, PATIENCE, StepLooks


def looked_at(looks: StepLooks, passes: int, *, tokens: int = 16, layer: int = 1, pays: bool = False) -> str:
    """In which of so many passes."""
    seen = ""
    for _ in range(passes):
        looks.begin(tokens)
        is_looked_at = looks.looks_at(layer)
        if is_looked_at:
            looks.saw(layer, pays=pays)
        seen += "x" if is_looked_at else "."
    return seen


def test_a_layer_that_does_not_pay_is_looked_at_in_every_few_passes_and_another_one_in_all() -> None:
    looks = StepLooks(2)
    assert (PATIENCE, EVERY) == (4, 4)
    assert looked_at(looks, 16) == "xxxx" + "...x" * 3
    assert looks.looks_at(0)


def test_once_it_pays_it_is_looked_at_again() -> None:
    looks = StepLooks(2)
    assert looked_at(looks, 7) == "xxxx..."
    assert looked_at(looks, 6, pays=True) == "xxxxxx"
    assert looked_at(looks, 6) == "xxxx.."


def test_passes_of_another_size_and_new_homes_begin_anew() -> None:
    looks = StepLooks(2)
    assert looked_at(looks, 5) == "xxxx."
    assert looked_at(looks, 5, tokens=33) == "xxxx."
    assert looked_at(looks, 1, tokens=17) == "."
    assert looked_at(looks, 1, tokens=16) == "x", "less than half of 33"
    looks.forget(1)
    assert looked_at(looks, 5, tokens=60) == "xxxx."
