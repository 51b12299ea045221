"""Which tensors are saved, and what they come back as."""

import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import ckptkit
from ckptkit import errors
from ckptkit.args import PyTreeRestore
from ckptkit.leaves import RestoreArgs, SaveArgs

torch = pytest.importorskip("torch", reason="torch is not installed")

from ckptkit_torch import tensors  # noqa: E402 - it imports torch

DTYPES = sorted(map(str, tensors._NUMPY))


def there_and_back(path, tensor, target=None):
    ckptkit.save(path, {"leaf": tensor})
    return ckptkit.restore(path, None if target is None else {"leaf": target})["leaf"]


def bits(tensor):
    return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert bits(found) == bits(expected.resolve_conj().resolve_neg())


@pytest.mark.parametrize("shape", [(), (0, 3), (4, 3)], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_every_bit_of_every_dtype_comes_back(tmp_path, name, shape):
    dtype = getattr(torch, name.removeprefix("torch."))
    tensor = torch.empty(shape, dtype=dtype)
    memory = tensor.flatten().view(torch.uint8)
    memory.random_(0, 2 if name == "torch.bool" else 256, generator=torch.Generator().manual_seed(0))
    same(there_and_back(tmp_path / "c", tensor), tensor)


BASE = torch.arange(24.0).reshape(4, 6)
VIEWS = {
    "transposed": BASE.t(),
    "strided": BASE[::2, 1::3],
    "expanded": BASE[:1].expand(5, 6),
    "a part of a larger storage": BASE[1],
    "channels last": torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
    "conjugated": torch.complex(BASE, -BASE).conj(),
    "negated": torch.complex(BASE, -BASE).conj().imag,
    "bfloat16, transposed": BASE.to(torch.bfloat16).t(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_is_stored_as_what_it_shows(tmp_path, view):
    same(there_and_back(tmp_path / "c", view), view)


def test_a_view_that_is_cut_into_chunks_is_stored_as_what_it_shows(tmp_path):
    view = torch.complex(BASE, -BASE).conj().t()
    with ckptkit.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"leaf": view}, save_args={"leaf": SaveArgs(chunk_byte_size=32)})
    same(ckptkit.restore(tmp_path / "c")["leaf"], view)


def test_tensors_that_share_memory_are_stored_each_on_its_own(tmp_path):
    ckptkit.save(tmp_path / "c", {"all": BASE, "row": BASE[1]})
    found = ckptkit.restore(tmp_path / "c")
    found["all"].zero_()
    same(found["row"], BASE[1])


def test_save_args_cast(tmp_path):
    with ckptkit.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"leaf": BASE}, save_args={"leaf": SaveArgs(dtype=ml_dtypes.bfloat16)})
    same(ckptkit.restore(tmp_path / "c")["leaf"], BASE.to(torch.bfloat16))


def freed():
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


def fake():
    fakes = pytest.importorskip("torch._subclasses.fake_tensor")
    with fakes.FakeTensorMode():
        return torch.ones(3)


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch say that they will make none any more
        return torch.empty(3, dtype=torch.qint8)


REFUSED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo, and only dense ones"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "wraps other tensors|nested"),
    "dtype": (lambda: torch.empty(3, dtype=torch.int4), "torch.int4 is torch's alone; use tensor.to"),
    "quantised": (quantised, r"torch.qint8 is torch's alone; use tensor.dequantize\(\)"),
    "meta": (lambda: torch.empty(3, device="meta"), "holds no data; it is a target"),
    "lazy": (lambda: torch.nn.LazyLinear(3).weight, "has no shape yet; run the module once"),
    "freed": (freed, "storage of this tensor was freed"),
    "fake": (fake, "FakeTensor, which wraps other tensors"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path, make, message):
    with pytest.raises(errors.TreeError, match=message):
        ckptkit.save(tmp_path / "c", {"leaf": make()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["sparse", "dtype", "lazy", "fake"])
def test_what_cannot_be_a_target_is_refused(tmp_path, name):
    make, message = REFUSED[name]
    with pytest.raises(errors.TargetError, match=message):
        there_and_back(tmp_path / "c", torch.ones(3), make())


@pytest.mark.parametrize("requires_grad", [True, False])
def test_the_target_says_the_class_and_whether_a_gradient_is_required(tmp_path, requires_grad):
    parameter = torch.nn.Parameter(BASE.clone(), requires_grad=requires_grad)
    found = there_and_back(tmp_path / "c", parameter, parameter)
    assert (type(found), found.requires_grad, found.is_leaf) == (torch.nn.Parameter, requires_grad, True)
    same(found, parameter)


def test_without_a_target_no_gradient_is_required(tmp_path):
    found = there_and_back(tmp_path / "c", torch.nn.Parameter(BASE.clone()))
    assert (type(found), found.requires_grad) == (torch.Tensor, False)


def test_a_subclass_comes_back_as_one_by_target(tmp_path):
    class Named(torch.Tensor):
        pass

    found = there_and_back(tmp_path / "c", BASE.as_subclass(Named), BASE.as_subclass(Named))
    assert type(found) is Named


class Tied(torch.nn.Parameter):
    """A Parameter of a class of its own."""


class Scaled(torch.Tensor):
    """Of which torch makes Parameters that keep this class."""


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("kind", [Tied, Scaled])
def test_a_parameter_of_another_class_comes_back_as_one(tmp_path, kind, requires_grad):
    target = Tied(BASE.clone(), requires_grad) if kind is Tied else torch.nn.Parameter(BASE.as_subclass(kind), requires_grad)
    found = there_and_back(tmp_path / "c", target, target)
    assert (type(found), isinstance(found, torch.nn.Parameter)) == (kind, True)
    assert (found.requires_grad, found.is_leaf) == (requires_grad, True)
    same(found.as_subclass(torch.Tensor), BASE)


def test_restore_args_name_the_class(tmp_path):
    ckptkit.save(tmp_path / "c", {"leaf": jnp.arange(3, dtype=jnp.int4)})
    request = RestoreArgs(restore_type=torch.nn.Parameter, dtype=np.float32)
    found = ckptkit.restore(tmp_path / "c", PyTreeRestore(restore_args={"leaf": request}))["leaf"]
    assert isinstance(found, torch.nn.Parameter)
    same(found, torch.arange(3.0))


def test_what_torch_has_no_dtype_for_is_refused(tmp_path):
    ckptkit.save(tmp_path / "c", {"leaf": jnp.arange(3, dtype=jnp.int4)})
    request = RestoreArgs(restore_type=torch.Tensor)
    with pytest.raises(errors.TargetError, match="torch has no dtype int4; ask for one that it has"):
        ckptkit.restore(tmp_path / "c", PyTreeRestore(restore_args={"leaf": request}))


def test_another_shape_is_refused(tmp_path):
    with pytest.raises(errors.TargetError, match=r"stored shape \(4, 6\), requested shape \(6, 4\)"):
        there_and_back(tmp_path / "c", BASE, BASE.t())


def test_a_looser_restore_pads_and_truncates(tmp_path):
    ckptkit.save(tmp_path / "c", {"leaf": BASE})
    with ckptkit.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "c", {"leaf": torch.ones(5, 2)}, strict=False)["leaf"]
    same(found, torch.cat([BASE[:, :2], torch.zeros(1, 2)]))


def test_a_cast_that_is_not_allowed_is_refused(tmp_path):
    ckptkit.save(tmp_path / "c", {"leaf": BASE})
    with ckptkit.StandardCheckpointer() as checkpointer, pytest.raises(errors.TargetError, match="casting='same_kind' forbids"):
        checkpointer.restore(tmp_path / "c", {"leaf": BASE.to(torch.int32)}, casting="same_kind")


def test_arrays_of_eight_devices_open_as_tensors(tmp_path, devices):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    values = jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8)
    ckptkit.save(tmp_path / "c", {"leaf": jax.device_put(values, NamedSharding(mesh, PartitionSpec("x", "y")))})
    target = torch.empty(8, 8, dtype=torch.bfloat16, device="meta")
    same(ckptkit.restore(tmp_path / "c", {"leaf": target})["leaf"], torch.arange(64).to(torch.bfloat16).reshape(8, 8))


def test_tensors_open_as_arrays_on_eight_devices(tmp_path, devices):
    sharding = NamedSharding(jax.make_mesh((4, 2), ("x", "y")), PartitionSpec("y"))
    target = jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=sharding)
    found = there_and_back(tmp_path / "c", BASE, target)
    assert found.sharding == sharding
    assert np.asarray(found).tobytes() == bits(BASE)


def test_orbax_reads_tensors_as_arrays(tmp_path):
    ckptkit.save(tmp_path / "c", {"leaf": BASE, "half": BASE.to(torch.bfloat16)})
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(tmp_path / "c")
    assert {name: (value.dtype.name, value.tobytes()) for name, value in found.items()} == {
        "leaf": ("float32", bits(BASE)),
        "half": ("bfloat16", bits(BASE.to(torch.bfloat16))),
    }
