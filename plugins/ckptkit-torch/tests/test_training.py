"""A PyTorch training through a checkpoint: state_dicts of model and optimizer, and what comes after."""

import importlib.util
import uuid

import jax
import pytest

import ckptkit
from ckptkit import errors
from ckptkit_torch import optimizer_state

torch = pytest.importorskip("torch", reason="torch is not installed")

OPTIMIZERS = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "SGD without state": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "two groups": lambda parameters: torch.optim.AdamW([{"params": [next(parameters)], "lr": 0.5}, {"params": list(parameters)}]),
}


def model():
    """Layers with parameters of two dtypes, buffers of a third, and a weight that is tied to another."""
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
    made[2].weight = made[0].weight
    made.register_parameter("scale", torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16)))
    return made


def train(model, optimizer, steps):
    """The loss of each step; everything in it is the same for the same state."""
    losses = []
    for step in range(steps):
        batch = torch.linspace(-1, 1, 32).reshape(8, 4) * (step + 1)
        optimizer.zero_grad()
        loss = (model(batch) * model.scale).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(make_optimizer, steps=3):
    made = model()
    optimizer = make_optimizer(made.parameters())
    train(made, optimizer, steps)
    return made, optimizer


def state(model, optimizer):
    return {"model": model.state_dict(), "opt": optimizer.state_dict()}


@pytest.fixture(params=["file", "memory"])
def place(request, tmp_path):
    if request.param == "file":
        yield tmp_path / "checkpoint"
        return
    url = f"memory://torch/{uuid.uuid4()}"
    yield url
    ckptkit.default_registry().location(url).delete()


@pytest.mark.parametrize("storage", ["ocdbt", "zarr", "safetensors"])
def test_training_goes_on_as_if_nothing_had_been(place, storage):
    if storage == "safetensors" and importlib.util.find_spec("ckptkit_safetensors") is None:
        pytest.skip("ckptkit-safetensors is not installed")
    original, optimizer = trained(OPTIMIZERS["Adam"])
    if storage == "safetensors" and str(place).startswith("memory:"):
        with pytest.raises(errors.ArgsError, match="not on this machine"):
            ckptkit.save(place, state(original, optimizer), storage=storage)
        return
    ckptkit.save(place, state(original, optimizer), storage=storage)
    other, other_optimizer = trained(OPTIMIZERS["Adam"], steps=1)
    restored = ckptkit.restore(place, state(other, other_optimizer))
    other.load_state_dict(restored["model"])
    other_optimizer.load_state_dict(restored["opt"])
    assert train(other, other_optimizer, 5) == train(original, optimizer, 5)
    assert other[2].weight is other[0].weight


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_that_never_stepped_takes_a_restore_without_a_target(tmp_path, make_optimizer):
    original, optimizer = trained(make_optimizer)
    ckptkit.save(tmp_path / "c", state(original, optimizer))
    restored = ckptkit.restore(tmp_path / "c")
    other, other_optimizer = trained(make_optimizer, steps=0)
    other.load_state_dict(restored["model"])
    other_optimizer.load_state_dict(optimizer_state(restored["opt"]))
    assert train(other, other_optimizer, 5) == train(original, optimizer, 5)


def test_everything_of_a_state_dict_comes_back(tmp_path):
    saved = state(*trained(OPTIMIZERS["two groups"]))
    ckptkit.save(tmp_path / "c", saved)
    restored = ckptkit.restore(tmp_path / "c", saved)
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True):
        assert type(found) is type(expected)
        assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected


def test_steps_after_a_save_do_not_change_what_is_written(tmp_path):
    original, optimizer = trained(OPTIMIZERS["Adam"])
    expected = jax.tree.map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, original.state_dict())
    handle = ckptkit.save_async(tmp_path / "c", state(original, optimizer))
    train(original, optimizer, 5)
    handle.result(60)
    found = ckptkit.restore(tmp_path / "c")["model"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tree", [None, {"model": {}}, {"state": {"weight": 1}}], ids=str)
def test_what_is_no_state_of_an_optimizer_is_refused(tree):
    with pytest.raises(errors.ArgsTypeError, match="no state_dict of an optimizer"):
        optimizer_state(tree)
