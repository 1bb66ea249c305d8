"""Every way in which a constructor draws."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tests.support.cases import Bag, Registry

RANDOMNESS = Registry([])


@RANDOMNESS.case()
def random_factories():
    like = torch.zeros(3, 5)
    return Bag(
        uniform=torch.rand(4, 6),
        normal=torch.randn(5, 5),
        uniform_like=torch.rand_like(like),
        normal_like=torch.randn_like(like, dtype=torch.float64),
        integers=torch.randint(-3, 9, (11,)),
        integers_like=torch.randint_like(like, 7),
        permutation=torch.randperm(13),
        mean_of_tensor=torch.normal(torch.arange(5.0), 0.1),
        both_tensors=torch.normal(torch.zeros(20), torch.linspace(0.1, 2, 20)),
        plain=torch.normal(1.0, 2.0, (4, 5)),
    )


@RANDOMNESS.case()
def distributions_in_place():
    return Bag(
        bernoulli=torch.empty(9).bernoulli_(0.3),
        bernoulli_of_tensor=torch.bernoulli(torch.full((7,), 0.6)),
        exponential=torch.empty(17).exponential_(2.0),
        cauchy=torch.empty(5).cauchy_(),
        log_normal=torch.empty(18).log_normal_(0.0, 0.5),
        geometric=torch.empty(6).geometric_(0.2),
        any_integer=torch.empty(8, dtype=torch.int32).random_(),
        bounded=torch.empty(8, dtype=torch.int64).random_(3, 50),
        poisson=torch.poisson(torch.full((6,), 3.0)),
        binomial=torch.binomial(torch.full((5,), 10.0), torch.full((5,), 0.4)),
    )


@RANDOMNESS.case()
def draws_without_and_with_replacement():
    weights = torch.rand(10)
    return Bag(
        chosen=torch.multinomial(weights, 4),
        repeated=torch.multinomial(weights, 12, replacement=True),
        dropped=nn.functional.dropout(torch.ones(20), 0.5, training=True),
        gumbel=nn.functional.gumbel_softmax(torch.zeros(3, 5)),
    )


@RANDOMNESS.case()
def distribution_objects():
    return Bag(
        normal=torch.distributions.Normal(torch.zeros(5), 2.0).sample(),
        gamma=torch.distributions.Gamma(torch.full((4,), 2.0), 1.0).sample(),
        dirichlet=torch.distributions.Dirichlet(torch.ones(3)).sample((2,)),
        categorical=torch.distributions.Categorical(torch.ones(6)).sample((7,)),
    )


# Below 16 elements normal_ keeps the second of each pair for the next call; from 16 it does not.
@RANDOMNESS.case()
def small_normals_between_large_ones():
    sizes = (1, 40, 3, 15, 16, 5, 17, 1, 100, 31, 2, 7)
    return nn.ParameterList(torch.randn(size) for size in sizes)


@RANDOMNESS.case()
def odd_normals_in_every_dtype():
    dtypes = (torch.float64, torch.bfloat16, torch.float16, torch.float32)
    tensors = [torch.empty(n, dtype=d).normal_() for n in (3, 33, 16, 1) for d in dtypes]
    return Bag(tensors=tensors, last=torch.randn(3))


@RANDOMNESS.case()
def uniforms_in_every_dtype():
    dtypes = (torch.float64, torch.bfloat16, torch.float16, torch.float32)
    tensors = [torch.empty(n, dtype=d).uniform_(-2, 5) for n in (3, 33, 16) for d in dtypes]
    return Bag(tensors=tensors, last=torch.rand(3))


@RANDOMNESS.case()
def draws_into_what_is_not_contiguous():
    base = torch.zeros(6, 8)
    base.T.normal_()
    base[:, 2:5].uniform_()
    base[::2].normal_(1.0, 3.0)
    base.diagonal().exponential_()
    base[1:3].normal_()
    return Bag(base=nn.Parameter(base), after=torch.randn(5))


@RANDOMNESS.case()
def complex_draws():
    return Bag(
        normal=nn.Parameter(torch.randn(9, dtype=torch.complex64)),
        wide=torch.randn(3, dtype=torch.complex128),
        uniform=torch.rand(5, dtype=torch.complex64),
        after=torch.randn(2),
    )


@RANDOMNESS.case()
def draws_that_are_thrown_away():
    first = nn.Linear(5, 7)
    del first
    torch.randn(3)
    kept = nn.Linear(7, 5)
    nn.init.normal_(kept.weight)
    nn.init.uniform_(kept.weight)
    kept.weight.data.copy_(torch.randn(5, 7))
    return kept


@RANDOMNESS.case()
def generator_of_its_own():
    generator = torch.Generator().manual_seed(17)
    first = torch.randn(4, 5, generator=generator)
    between = torch.randn(3)
    second = torch.empty(7).uniform_(generator=generator)
    order = torch.randperm(6, generator=generator)
    return Bag(first=first, between=between, second=second, order=order)


@RANDOMNESS.case()
def default_generator_by_name():
    weight = torch.empty(5, 4).normal_(generator=torch.default_generator)
    nn.init.trunc_normal_(weight[:2], generator=torch.default_generator)
    return Bag(weight=weight, after=torch.rand(3))


@RANDOMNESS.case()
def generator_copied_and_rewound():
    generator = torch.Generator()
    generator.manual_seed(3)
    state = generator.get_state()
    first = torch.rand(6, generator=generator)
    generator.set_state(state)
    again = torch.rand(6, generator=generator)
    other = torch.Generator()
    other.set_state(generator.get_state())
    return Bag(first=first, again=again, other=torch.rand(2, generator=other))


@RANDOMNESS.case()
def seed_set_inside():
    before = torch.randn(4)
    torch.manual_seed(123)
    return Bag(before=before, layer=nn.Linear(4, 3), after=torch.randn(3))


# The laws build from seed 0 as well, and another seed moves the stream outside alone.
@RANDOMNESS.case()
def seed_inside_equal_to_the_one_outside():
    before = torch.randn(4)
    own = torch.randn(3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    return Bag(before=before, own=own, after=torch.randn(4))


@RANDOMNESS.case()
def generator_forked():
    before = torch.randn(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        inside = torch.randn(5)
    return Bag(before=before, inside=inside, after=torch.randn(3))


@RANDOMNESS.case()
def generator_forked_without_a_seed():
    with torch.random.fork_rng(devices=[]):
        inside = torch.randn(5, 4)
    return Bag(inside=inside, same_again=torch.randn(5, 4))


# The state is a value, and it depends on the seed.
@RANDOMNESS.case(reads_random=True)
def generator_state_saved_and_restored():
    state = torch.get_rng_state()
    first = torch.randn(3)
    torch.set_rng_state(state)
    again = torch.randn(3)
    model = Bag(first=first, again=again, after=torch.randn(20))
    model.same = torch.equal(first, again)
    return model


@RANDOMNESS.case(reads_random=True)
def generator_seeded_by_a_draw():
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ()).item()))
    return Bag(first=torch.randn(4, generator=generator), second=torch.randn(3))


@RANDOMNESS.case(reads_random=True)
def branch_on_a_drawn_value():
    coin = torch.rand(1).item()
    layer = nn.Linear(4, 3) if coin > 0.5 else nn.Linear(4, 3, bias=False)
    return nn.Sequential(layer, nn.Linear(3, 2))


@RANDOMNESS.case(reads_random=True)
def loop_until_a_draw_is_good():
    weight = torch.randn(3)
    tries = 1
    while weight.abs().max() > 1:
        weight.normal_()
        tries += 1
    model = Bag(weight=nn.Parameter(weight), after=torch.randn(3))
    model.tries = tries
    return model


@RANDOMNESS.case(reads_random=True)
def shape_that_depends_on_a_draw():
    scores = torch.rand(12)
    kept = scores[scores > 0.5]
    return Bag(kept=kept, where=torch.nonzero(scores > 0.5), after=torch.randn(3))


@RANDOMNESS.case(reads_random=True)
def size_taken_from_a_drawn_shape():
    kept = torch.nonzero(torch.rand(20) > 0.5)
    return nn.Sequential(nn.Linear(len(kept), 2), nn.Linear(2, 3))


@RANDOMNESS.case()
def numpy_draws():
    weights = np.random.default_rng(5).normal(size=(4, 3)).astype(np.float32)
    return Bag(weight=nn.Parameter(torch.from_numpy(weights)), drawn=torch.randn(3))
