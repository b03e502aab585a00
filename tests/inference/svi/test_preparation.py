"""What is found out about data and programs before the first step."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_vae import LinearGaussian, fit
from pyro_vae.inference.programs import ProgramError
from pyro_vae.inference.svi.evaluation import check_held_out
from pyro_vae.inference.svi.mini_batches import TrainingData, move_data
from pyro_vae.inference.svi.preparation import prepare

NUM_DATA, DATA_DIM = 200, 3


def amortised():
    module = LinearGaussian(DATA_DIM, 2)
    return module.model, module.guide


def of_each_datum():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = z[:, None].expand(-1, DATA_DIM)
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        locs = pyro.param("locs", lambda: torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(locs, 1.0))

    return model, guide


def of_all_data():
    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(DATA_DIM), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x):
        at = pyro.param("at", torch.zeros(DATA_DIM))
        pyro.sample("loc", dist.Normal(at, 1.0).to_event(1))

    return model, guide


def subsampling():
    _, guide = of_all_data()

    def model(x):
        loc = pyro.sample("loc", dist.Normal(torch.zeros(DATA_DIM), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=7) as some:
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x[some])

    return model, guide


def prepared(programs, batch_size=None, num_data=NUM_DATA):
    model, guide = programs
    x = torch.randn(num_data, DATA_DIM)
    data = TrainingData(x, None, seed=0)
    return prepare(model, guide, data, loss=Trace_ELBO(), batch_size=batch_size, warmup_epochs=0)


@pytest.mark.parametrize(
    ("build", "batch_size", "joint", "per_datum"),
    [
        (amortised, 128, False, ""),
        (of_each_datum, NUM_DATA, False, "locs"),
        (of_all_data, NUM_DATA, True, ""),
    ],
)
def test_the_mini_batch_is_what_the_latents_allow(build, batch_size, joint, per_datum):
    found = prepared(build())
    assert (found.batch_size, found.joint, found.per_datum) == (batch_size, joint, per_datum)
    assert found.takes_some == (build is amortised)
    assert found.max_plate_nesting == 1
    assert found.num_data(7) == 7


def test_a_model_that_subsamples_sees_all_data_and_speaks_for_all():
    found = prepared(subsampling(), num_data=50)
    assert (found.batch_size, found.structure) == (50, None)
    assert (found.subsampled.size, found.subsampled.full_size) == (7, 50)
    assert found.num_data(7) == 50


@pytest.mark.parametrize("build", [of_each_datum, of_all_data, subsampling])
def test_mini_batches_that_share_latents_are_taken_where_they_are_asked_for(build):
    assert prepared(build(), batch_size=NUM_DATA).mini_batches is None
    pyro.clear_param_store()
    found = prepared(build(), batch_size=NUM_DATA - 1)
    assert found.batch_size == NUM_DATA - 1
    assert found.mini_batches.plates == {"data"}
    assert found.mini_batches.whole == found.data.whole == (build is subsampling)
    assert found.mini_batches.row_axes == ({"locs": 0} if build is of_each_datum else {})
    assert found.num_data(7) == NUM_DATA
    assert not found.takes_some


def drawn(name, loc, **options):
    with pyro.plate("data"):
        return pyro.sample(name, dist.Normal(loc, 1.0).expand([NUM_DATA]), **options)


def observing(name="z"):
    def model(x):
        pyro.sample("x", dist.Normal(drawn(name, 0.0), 1.0).to_event(1), obs=x[:, 0])

    return model


FAULTY = {  # pairs without a parameter, whose fault is another one
    "another name": (observing("code"), lambda x: drawn("z", 0.0), "'code' is missing from the"),
    "one too many": (
        observing(),
        lambda x: (drawn("z", 0.0), pyro.sample("surplus", dist.Normal(0.0, 1.0))),
        "'surplus', which the model does not have",
    ),
    "outside": (
        lambda x: drawn("x", drawn("z", 0.0), obs=x[:, 0]),
        lambda x: pyro.sample("z", dist.Normal(x[:, 0], 1.0)),
        "no site of the guide is in a vectorised pyro.plate(?!.*joint=True)",
    ),
    "swapped": (lambda x: drawn("z", 0.0), observing(), "'x' is observed.* in the other order"),
    "swapped factor": (
        lambda x: drawn("z", 0.0),
        lambda x: pyro.factor("x", -drawn("z", 0.0).square().sum()),
        "'x' is observed.* in the other order",
    ),
    "data sampled": (
        observing(),
        lambda x: (drawn("z", 0.0), pyro.sample("x", dist.Normal(0.0, 1.0))),
        "'x' is observed in the model but stands in the guide",
    ),
    "empty": (lambda x: None, lambda x: None, "the model has no site"),
    "noise": (
        lambda x: drawn("x", drawn("z", 0.0) + torch.rand(()), obs=x[:, 0]),
        lambda x: drawn("z", 0.0),
        "the model is not deterministic.*neither model nor guide has a parameter",
    ),
}


CASES = [(n, t) for n in FAULTY for t in (False, True) if not t or n not in ("outside", "noise")]


@pytest.mark.parametrize(("name", "trainable"), CASES)
def test_the_fault_of_a_pair_is_named_with_or_without_parameters(name, trainable):
    model, guide, says = FAULTY[name]

    def with_parameter(x):
        pyro.param("unused", torch.zeros(()))
        guide(x)

    with pytest.raises(ProgramError, match=says):
        prepared((model, with_parameter if trainable else guide))


def test_held_out_data_are_refused_or_cut_to_what_a_trial_needs():
    x = torch.randn(300, DATA_DIM)
    found = prepared(amortised())
    assert torch.equal(check_held_out(found, x), x[:128])
    assert check_held_out(prepared(of_all_data()), x) is x
    with pytest.raises(ValueError, match="validation data are empty"):
        check_held_out(found, x[:0])
    with pytest.raises(ProgramError, match="says nothing of held-out data"):
        check_held_out(prepared(of_each_datum()), x)


def test_parameters_of_others_are_left_out():
    pyro.param("theirs", torch.zeros(2))
    assert prepared(of_all_data()).foreign == {"theirs"}


def test_training_data_go_on_where_their_random_states_say():
    def noisy(a, generator):
        return a + torch.randn(a.shape, generator=generator)

    data = TrainingData((torch.zeros(5, 2), "as it is"), noisy, seed=3)
    data.batch(torch.tensor([1, 2]))
    states = data.random_states()
    first = data.batch(torch.tensor([0, 4]))
    order = torch.randperm(5, generator=data.shuffler)
    again = TrainingData((torch.zeros(5, 2), "as it is"), noisy, seed=3)
    assert not torch.equal(again.batch(torch.tensor([0, 4]))[0], first[0])
    again.set_random_states(states)
    assert torch.equal(again.batch(torch.tensor([0, 4]))[0], first[0])
    assert torch.equal(torch.randperm(5, generator=again.shuffler), order)
    assert first[1] == "as it is"


def test_the_hash_is_of_the_tensors_alone():
    def hashed(x):
        return TrainingData(x, None, seed=0).sha256()

    x, y = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    assert hashed((x, y)) == hashed({"x": x, "n": 3, "y": y})
    assert hashed((x, y)) != hashed((y, x))
    assert hashed(()) == hashed("none")


def test_data_are_moved_in_their_form():
    moved = move_data({"x": torch.ones(2), "n": (torch.ones(1), 3)}, "meta")
    assert moved["x"].device.type == moved["n"][0].device.type == "meta"
    assert moved["n"][1] == 3


def test_a_model_that_subsamples_more_data_than_a_probe_holds_keeps_its_factor():
    x = torch.randn(200)

    def model(x):
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(x), subsample_size=20) as rows:
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x[rows])

    def guide(x):
        pass

    reached = fit(model, guide, x, epochs=40, learning_rate=0.1, progress=False)
    exact = torch.distributions.Normal(reached.parameters["loc"], 1.0).log_prob(x).mean()
    # Each bound is that of 20 of the 200 rows: their spread is the sd of one datum / sqrt(20).
    spread = torch.distributions.Normal(0.0, 1.0).log_prob(x).std() / 20**0.5
    assert abs(float(reached.history.bound[-1]) - exact) < 4 * spread
    assert abs(float(reached.history.bound[-1]) - exact * 200 / 128) > 0.2  # what it once was
