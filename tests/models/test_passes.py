"""Views that share passes are cut and put together without copies."""

import torch
from torch import nn

from rotssl.models.passes import as_one, each_view, joined, parts


def test_parts_of_a_tensor_are_that_tensor_again_and_all_else_is_copied():
    whole = torch.randn(6, 3)
    first, second, third = parts(whole, [1, 2, 3])
    assert joined([first, second, third]) is whole and joined([second]) is second
    others = ([third, second, first], [first, second], [first, first, third], [first, second, third.view_as(third)])
    for views in (*others, [*parts(whole.clone(), [1, 5])[:1], second]):
        found = joined(views)
        assert found is not whole and torch.equal(found, torch.cat(views))


def test_what_is_done_to_parts_is_done_once():
    made, one, other = [], parts(torch.randn(4, 3), [2, 2]), parts(torch.randn(3, 3), [1, 2])

    def change(rows):
        made.append(2 * rows)
        return made[-1]

    views = [*one, torch.randn(5, 3), *other, one[0]]
    found = as_one(change, views)
    assert [len(rows) for rows in made] == [4, 5, 3, 2]
    assert all(torch.equal(new, 2 * old) for new, old in zip(found, views, strict=True))
    assert joined(found[:2]) is made[0] and joined(found[3:5]) is made[2]


def test_the_gradient_of_views_that_pass_two_networks_is_that_of_each_view_alone():
    networks = nn.Linear(5, 4).double(), nn.Linear(4, 2).double()
    views = [torch.randn(3, 5, dtype=torch.double) for _ in range(2)]
    gradients = []
    for alone in (False, True):
        images = [view.clone().requires_grad_() for view in views]
        groups = [[image] for image in images] if alone else [images]
        seen, out = [], []
        hook = networks[1].register_forward_hook(lambda module, given, made, seen=seen: seen.append(made))
        for group in groups:
            out += each_view(networks[1], each_view(networks[0], group))
            assert joined(out[-len(group) :]) is seen[-1]
        hook.remove()
        assert len(seen) == len(groups)
        weighed = sum(i * view.square().sum() for i, view in enumerate(out, 1))
        gradients.append(torch.autograd.grad(weighed, [*images, *networks[0].parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])
