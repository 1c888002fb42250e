"""The plan of least damage against all plans."""

import numpy as np
import pytest
import torch

from olica.methods.multiplier import Choice, least_damage, merged


def choices(seed: int, parts: int, sizes: int, is_convex: bool) -> list[Choice]:
    """Parts whose damage falls with their size; of equal steps in parameters where it is convex."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(parts):
        steps = torch.rand(sizes - 1, generator=generator, dtype=torch.float64)
        steps = steps.sort(descending=True).values if is_convex else steps
        damage = torch.cat([steps.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        step = 1.0 if is_convex else float(torch.randint(1, 5, (), generator=generator))
        made.append(Choice([*range(10, 10 + sizes)], step * torch.arange(1.0, sizes + 1, dtype=torch.float64), damage))
    return made


def of(parts: list[Choice], plan: list[int]) -> tuple[float, float]:
    """Parameters and damage of a plan."""
    indices = [part.sizes.index(size) for part, size in zip(parts, plan, strict=True)]
    return tuple(
        sum(getattr(part, name)[index].item() for part, index in zip(parts, indices, strict=True))
        for name in ("parameters", "damage")
    )


@pytest.mark.parametrize("is_convex", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_no_plan_that_fits_does_less_damage(seed, is_convex):
    """Three layers of three parts, all plans: exact where damage is convex and steps are equal, else all but so."""
    parts = choices(seed, 9, 4, is_convex)
    # All plans: sums over one axis for each part.
    held_by_all, damage_of_all = (
        sum(grid for grid in np.meshgrid(*(getattr(part, name) for part in parts), indexing="ij"))
        for name in ("parameters", "damage")
    )
    fewest, most = held_by_all.min(), held_by_all.max()
    for share in (0.0, 0.3, 0.5, 0.77, 1.0):
        budget = fewest + share * (most - fewest)
        held, damage = of(parts, least_damage(parts, budget))
        best = damage_of_all[held_by_all <= budget + 1e-9].min()
        assert held <= budget + 1e-9
        if is_convex:
            assert damage == pytest.approx(best, abs=1e-12)
        else:
            assert damage <= best + 0.05 * damage_of_all.max()


def test_what_steps_leave_of_the_budget_is_spent():
    coarse = Choice([0, 1], torch.tensor([0.0, 100.0]), torch.tensor([5.0, 0.0]))
    fine = Choice([*range(11)], torch.arange(11.0), torch.arange(1.0, -0.1, -0.1))
    # Per parameter the fine steps spare twice as much; with all of them the coarse one fits only from 110 on.
    assert least_damage([coarse, fine], 110.0) == [1, 10]
    assert least_damage([coarse, fine], 99.0) == [0, 10]
    steep = Choice([*range(11)], torch.arange(11.0), torch.arange(0.1, -0.001, -0.01))
    # The coarse one goes first, and the rest into as many fine steps as fit.
    assert least_damage([coarse, steep], 104.5) == [1, 4]


def test_what_does_no_damage_is_kept_as_far_as_the_budget_goes():
    harmless = Choice([*range(1, 11)], torch.arange(1.0, 11), torch.zeros(10))
    dear = Choice([*range(1, 11)], torch.arange(1.0, 11), torch.arange(9.0, -1, -1))
    assert least_damage([harmless, dear], 17.0) == [7, 10]
    assert least_damage([harmless, dear], 9.5) == [1, 8]
    assert least_damage([harmless, harmless], 20.0) == [10, 10]


def test_a_budget_below_the_smallest_sizes_is_refused():
    part = Choice([3, 4], torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]))
    assert least_damage([part, part], 6.0) == [3, 3]
    with pytest.raises(ValueError, match="hold more"):
        least_damage([part, part], 5.9)


def test_parts_of_one_size_are_decided_as_one():
    parts = choices(0, 3, 4, is_convex=True)
    one = merged(parts)
    assert one.sizes == parts[0].sizes
    torch.testing.assert_close(one.damage, parts[0].damage + parts[1].damage + parts[2].damage)
    (size,) = least_damage([one], 6.0)
    assert of(parts, [size] * 3)[0] == 6.0
