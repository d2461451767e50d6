"""A pretend accelerator: tensors that say they live on ``pretend:0``, hold CPU data, and refuse what CUDA or MPS would.

    with pretend.accelerator("mps") as device:
        x = torch.zeros(3, device=device) + torch.zeros(3)     # raises WrongDevice
    device.copies, device.waits                                # {where in tiltflow: how often}

Refused, by name: tensors of two devices in one operation (a number may come from the CPU), a generator of another device,
an index or a generator's state on the wrong side, ``.numpy()`` without ``.cpu()``, and as "mps" float64. Counted: copies
between host and device, and waits of the host for the device (``.item()``, masks, ``nonzero``). PyTorch's own Python backend
gives the device its name, so that ``--device pretend`` reaches it through the front door.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import tiltflow

NAME = "pretend"
_now: "Accelerator | None" = None


class Backend(_DummyBackendModule):
    """What PyTorch asks of ``torch.pretend``."""

    def is_available(self):
        return _now is not None

    def device_count(self):
        return int(_now is not None)

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        """Its numbers are those of the CPU, whose state is put back anyway."""


_setup_privateuseone_for_python_backend(rename=NAME, backend_module=Backend())
DEVICE = torch.device(NAME, 0)
PACKAGE = str(Path(tiltflow.__file__).parent)
CPU = torch.device("cpu")
aten = torch.ops.aten

COPIES = {aten._to_copy, aten.copy_, aten.copy}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
"""Whose indices may come from the CPU: they are copied."""
POINTWISE = {
    aten.add, aten.add_, aten.sub, aten.sub_, aten.mul, aten.mul_, aten.div, aten.div_, aten.pow, aten.where, aten.rsub,
    aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.maximum, aten.minimum, aten.fill_, aten.fill,
    aten.masked_fill, aten.masked_fill_, aten.remainder, aten.clamp, aten.clamp_min, aten.clamp_max,
}  # fmt: skip
"""Which take a number (a tensor without axes) of the CPU beside tensors of the device."""
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.unique_consecutive, aten._unique2,
    aten.repeat_interleave,
}  # fmt: skip


class WrongDevice(RuntimeError):
    """What an accelerator would have refused."""


class NoFloat64(TypeError):
    """What MPS says of float64."""


_GENERATORS: set[int] = set()
"""Those of the device, by address: PyTorch hands operations a bare object for them."""


class OnDevice(torch.Tensor):
    """A tensor of the device; ``held`` has its data."""

    @staticmethod
    def __new__(cls, held):
        if held.dtype in (torch.float64, torch.complex128) and _now is not None and _now.kind == "mps":
            raise NoFloat64("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"OnDevice{tuple(self.shape)}"

    def __reduce_ex__(self, protocol):
        raise WrongDevice("a tensor of the device is pickled")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.held = new.held

    def tolist(self):
        return self.cpu().tolist()


class Generator(torch.Generator):
    """A generator that says where it is; its numbers come from the CPU's."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, device="cpu")
        made.where = _device(device)
        if made.where == DEVICE:
            _GENERATORS.add(made._cdata)
        return made

    def __init__(self, device="cpu"):
        pass

    def __del__(self):
        _GENERATORS.discard(self._cdata)

    @property
    def device(self):
        return self.where

    def set_state(self, state):
        if isinstance(state, OnDevice):
            raise WrongDevice("the state of a generator must be a ByteTensor of the CPU")
        return super().set_state(state)


def _device(name):
    device = torch.device(name)
    return torch.device(NAME, device.index or 0) if device.type == NAME else device


class Accelerator(TorchDispatchMode):
    """The rules, while they hold, and the counts. ``str`` is its name for ``device=`` and ``--device``."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.clear()

    def clear(self):
        self.copies, self.waits = Counter(), Counter()

    def __str__(self):
        return NAME

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def accelerator(kind="cuda"):
    """The device, as ``kind`` (cuda or mps) would be."""
    global _now
    before, _now = (torch.Generator, _now), Accelerator(kind)
    torch.Generator = Generator
    try:
        with _now, torch.autograd.set_multithreading_enabled(False):  # a thread of the device would not know the rules
            yield _now
    finally:
        torch.Generator, _now = before


_LIBRARY = torch.library.Library("aten", "IMPL")
"""Of what ``torch.tensor`` calls, which goes past the dispatch mode."""
for _op in (aten.empty_strided.default, aten.empty.memory_format, aten.copy_.default):
    _LIBRARY.impl(_op, lambda *args, _op=_op, **kwargs: _run(_op, args, kwargs), "PrivateUse1")


def _caller():
    """The innermost line of tiltflow that is being run."""
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return "elsewhere" if frame is None else f"{frame.f_code.co_filename[len(PACKAGE) + 1 :]}:{frame.f_lineno}"


def _run(func, args, kwargs):
    """One operation: refuse, count, compute on the data, and say where the result is."""
    op, flat = func.overloadpacket, tree_flatten((args, kwargs))[0]
    tensors = [v for v in flat if isinstance(v, torch.Tensor)]
    mine = any(isinstance(v, OnDevice) for v in tensors)
    asked = kwargs.get("device")
    there = mine if asked is None else torch.device(asked).type == NAME
    for g in (v for v in flat if isinstance(v, torch._C.Generator)):
        if (g._cdata in _GENERATORS) != there:
            raise WrongDevice(f"{func}: Expected a generator of the {'device' if there else 'cpu'}, at {_caller()}")
    if op in COPIES:
        there = _copy(op, tensors, there)
    elif mine:
        _refuse_mixed(func, op, args, kwargs, tensors)
        if op in WAITING or (op in INDEXED and any(v.dtype == torch.bool for v in tensors)):
            _now.waits[_caller()] += 1
    bare = lambda v: v.held if isinstance(v, OnDevice) else v  # noqa: E731
    plain, named = tree_map(bare, args), tree_map(bare, kwargs)
    if asked is not None:
        named["device"] = CPU if there or torch.device(asked).type == NAME else asked
    out = func(*plain, **named)
    if not there or op is aten._local_scalar_dense:
        return out
    out = tree_map(lambda v: OnDevice(v) if type(v) is torch.Tensor else v, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if func._schema.returns and mine else out


def _copy(op, tensors, there):
    """Whether the result is on the device; copies across are counted."""
    source = tensors[1] if op is not aten._to_copy else tensors[0]
    there = isinstance(tensors[0], OnDevice) if op is not aten._to_copy else there
    if isinstance(source, OnDevice) != there:
        _now.copies[_caller()] += 1
    return there


def _refuse_mixed(func, op, args, kwargs, tensors):
    """Raise WrongDevice where tensors of the CPU come in."""
    own = args[0] if args and isinstance(args[0], torch.Tensor) else None
    foreign = [v for v in tensors if not isinstance(v, OnDevice)]
    if op in INDEXED and isinstance(own, OnDevice):
        indices = {id(v) for v in args[1] if v is not None}
        for v in foreign:
            if id(v) in indices:
                _now.copies[_caller()] += 1
        foreign = [v for v in foreign if id(v) not in indices]
    if op in POINTWISE and not (func._schema.is_mutable and own is not None and not isinstance(own, OnDevice)):
        foreign = [v for v in foreign if v.dim() > 0]
    if foreign:
        shapes = ", ".join(str(tuple(v.shape)) for v in foreign)
        raise WrongDevice(f"{func}: all tensors must be on the same device, found {shapes} on the cpu, at {_caller()}")
