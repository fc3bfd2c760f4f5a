"""Steps are undone to the bit, and what is no function of `(t, y)` is caught."""

import itertools
import math

import pytest
import torch
from helpers import ADAPTIVE, FIXED, Network, start
from reversax_torch import odeint
from reversax_torch._solve import WayBack
from reversax_torch._steps import halvings_of
from reversax_torch._twins import Symmetric, pop, push
from torch import nn

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def equal(a, b):
    words = lambda n: [n] if isinstance(n, torch.Tensor) else [n.high, n.low]
    return all(torch.equal(x, y) for x, y in zip(words(a), words(b), strict=True))


def numbers(dtype, seed):
    torch.manual_seed(seed)
    # Of all sizes, of both signs, and some that are zero.
    sizes = 10.0 ** torch.linspace(-9, 4, 1000)
    x = (torch.randn(1000, dtype=torch.float64) * sizes).to(dtype)
    return torch.where(torch.arange(1000) % 10 == 0, torch.zeros((), dtype=dtype), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_added_is_taken_back_to_the_bit(dtype):
    twins = Symmetric(dtype, None)
    a, b = (twins.encode(numbers(dtype, seed)) for seed in (0, 1))
    assert equal((a + b) - b, a)
    assert equal((a - b) + b, a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_is_decoded_to_what_it_was(dtype):
    twins, x = Symmetric(dtype, None), numbers(dtype, 0)
    error = (twins.decode(twins.encode(x)).double() - x.double()).abs()
    # Half a unit, and the rounding of the dtype.
    unit = twins.unit * (2.0**-62 if twins.wide else 1)
    assert (error <= unit / 2 + torch.finfo(dtype).eps * x.double().abs()).all()
    assert (error[x.abs() > 1e-4] <= 1e-16 * x[x.abs() > 1e-4].double().abs()).all()


@pytest.mark.parametrize("halvings", [0, 1, 2, 4, 30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_halved_gap_is_doubled_to_the_bit(dtype, halvings):
    twins, bits = Symmetric(dtype, None), []
    y, z = (twins.encode(numbers(dtype, seed)) for seed in (2, 3))
    (y1, z1), shed = twins.mix(y, z, halvings)
    if shed is not None:
        push(bits, shed, halvings)
    before, after = ((twins.decode(a - b).double()) for a, b in ((y, z), (y1, z1)))
    unit = twins.unit * (2.0**-62 if twins.wide else 1)
    smallest = float(torch.finfo(dtype).smallest_normal)
    error = (after - before / 2**halvings).abs()
    assert (error <= 2 * unit + smallest + 0.01 * before.abs()).all()
    assert equal(twins.unmix(y1, z1, halvings, bits)[0], y)
    assert equal(twins.unmix(y1, z1, halvings, [(shed, halvings)])[1], z)


def test_bits_come_back_in_opposite_order_and_fill_their_words():
    torch.manual_seed(0)
    counts = [4, 1, 3, 30, 2, 4] * 20
    shed = [torch.randint(0, 2**count, (5,)) for count in counts]
    bits = []
    for x, count in zip(shed, counts, strict=True):
        push(bits, x, count)
    assert len(bits) <= 1.5 * sum(counts) / 62
    for x, count in reversed(list(zip(shed, counts, strict=True))):
        assert torch.equal(pop(bits, count), x)
    assert not bits


def halvings(value, total, times):
    made, chosen = [], halvings_of(value, total)
    for before, after in itertools.pairwise(times):
        made.append(chosen(made, before, after))
    return made


@pytest.mark.parametrize("n", [1, 64, 100, 1000, 1024, 5000])
def test_halvings_are_spread_over_steps_of_one_size(n):
    made = halvings("auto", 256, [i / n for i in range(n + 1)])
    assert sum(made) in {1: [4], 5000: range(1250, 1500)}.get(n, [255, 256])
    assert max(made) - min(made) <= 1
    assert all(any(made[i : i + 4]) for i in range(n - 3))


def test_halvings_follow_time():
    made = halvings("auto", 320, torch.linspace(0, 1, 51).double().pow(2).tolist())
    assert max(made) == 4
    assert made[:8] == [0, 0, 1, 1, 1, 1, 2, 2]
    assert sum(halvings("auto", 320, [i / 1000 for i in range(1001)])) == 320


def test_halvings_that_are_given_are_made_at_each_step():
    times = [i / 7 for i in range(8)]
    assert halvings(3, 256, times) == [3] * 7
    assert halvings(1 / 3, 256, times) == [0, 0, 1, 0, 0, 1, 0]


FIELDS = {
    "tanh": Network(dtype=torch.float32),
    "gelu and norm": Network(nn.GELU(), nn.LayerNorm(8), dtype=torch.float32),
    "damped": Network(damping=5.0, dtype=torch.float32),
    "attention": nn.Sequential(
        nn.Unflatten(1, (3, 1)), nn.Linear(1, 4),
        nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
        nn.Linear(4, 1), nn.Flatten(),
    ),
    "convolution": nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 3, padding=1), nn.Softplus(),
        nn.Conv1d(4, 1, 3, padding=1), nn.Flatten(),
    ),
}  # fmt: skip


class Autonomous(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, y):
        return self.net(y)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", FIELDS)
def test_both_passes_have_the_same_bits(name, mode):
    """Else the certificate raises: not a bit is allowed. In evaluation mode some layers
    take other kernels where no gradients are recorded."""
    field = FIELDS[name]
    field = field if isinstance(field, Network) else Autonomous(field)
    field.train(mode == "train")
    y0 = start(torch.float32, batch=5).requires_grad_()
    for method, steps in {"euler": 30, "rk4": 10, "dopri5": 5}.items():
        ys = odeint(field, y0, torch.linspace(0, 1, steps + 1), method=method)
        ys.sum().backward()
    assert y0.grad is not None and torch.isfinite(y0.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", FIXED + ADAPTIVE)
def test_the_way_back_ends_at_the_initial_pair(method, dtype):
    field, y0 = Network(damping=2.0, dtype=dtype), start(dtype)
    options = {"num_steps": 20, "halvings_per_step": 1 / 3}
    ys = odeint(field, y0, torch.tensor([0.0, 1.5]), method=method, options=options)
    walk = ys.grad_fn.walk
    way = WayBack(walk, torch.ones_like(ys), [True] * 4)
    assert all(equal(n, walk.twins.encode(y0)) for n in way.pair)
    assert not way.bits


def test_a_flipped_bit_is_caught():
    field, y0 = Network(dtype=torch.float16), start(torch.float16)
    ys = odeint(field, y0, torch.linspace(0, 1, 9), method="rk4")
    walk = ys.grad_fn.walk
    walk.pair[0].view(-1)[3] ^= 1
    with pytest.raises(RuntimeError, match="did not find the initial state again"):
        ys.sum().backward()


class Counting(Network):
    """Its values depend on how often it was called, by one part in a million."""

    calls = 0

    def forward(self, t, y):
        self.calls += 1
        return super().forward(t, y) * (1 + 1e-6 * self.calls)


class Statistics(Network):
    """Counts its calls in a buffer, on which no value depends."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, t, y):
        self.calls += 1
        return super().forward(t, y)


NO_FUNCTIONS = {
    "dropout": lambda: Network(nn.Dropout(0.1)),
    "BatchNorm": lambda: Network(nn.BatchNorm1d(8).double()),
    "counter": Counting,
    "buffer": Statistics,
}


@pytest.mark.parametrize("name", NO_FUNCTIONS)
def test_what_is_no_function_of_time_and_state_is_caught_and_named(name):
    field = NO_FUNCTIONS[name]()
    ys = odeint(field, start(), torch.linspace(0, 1, 9), method="midpoint")
    with pytest.raises(RuntimeError, match=r"^Call `func.eval\(\)`") as caught:
        ys.sum().backward()
    message = str(caught.value)
    assert all(x in message for x in ("dropout in training", "BatchNorm", "counter"))
    assert ("buffers" in message) == (name in ("BatchNorm", "buffer"))


@pytest.mark.parametrize("name", ["dropout", "BatchNorm"])
def test_a_field_in_evaluation_mode_is_a_function(name):
    field = NO_FUNCTIONS[name]().eval()
    odeint(field, start(), torch.linspace(0, 1, 9), method="midpoint").sum().backward()


def test_a_counter_that_changes_nothing_is_none_of_our_business():
    class Field(Network):
        nfe = 0

        def forward(self, t, y):
            self.nfe += 1
            return super().forward(t, y)

    field = Field()
    odeint(field, start(), torch.linspace(0, 1, 9), method="euler").sum().backward()
    assert field.nfe == 2 * 2 * 8


def test_a_tolerance_accepts_what_it_covers():
    def solve(tolerance):
        # Each halving that is undone doubles what is off.
        options = {"round_trip_tolerance": tolerance, "halvings_per_step": 1 / 8}
        t = torch.linspace(0, 1, 9)
        ys = odeint(Counting(), start(), t, method="midpoint", options=options)
        ys.sum().backward()

    solve(1e-2)
    solve(math.inf)
    with pytest.raises(RuntimeError, match="did not find"):
        solve(1e-9)


def test_parameters_changed_in_between_are_caught():
    field = Network()
    ys = odeint(field, start(), torch.linspace(0, 1, 9), method="euler")
    with torch.no_grad():
        next(field.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ys.sum().backward()


def test_published_coupling_says_when_it_lost_the_way():
    options = {"coupling": "mccallum-foster", "coupling_parameter": 0.6}
    field, t = Network(damping=3.0), torch.linspace(0, 4, 100)
    ys = odeint(field, start(), t, method="rk4", options=options)
    with pytest.raises(RuntimeError, match=r"^Leave out the option `coupling`"):
        ys.sum().backward()
