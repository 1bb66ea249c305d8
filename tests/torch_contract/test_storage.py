"""Storages, bits of conjugation and negation, and views of bytes."""

from __future__ import annotations

import hashlib
import mmap
import sys
import warnings
import zlib
from typing import Any

import pytest
import torch

from lateinit._torch import storage as storages
from lateinit._torch.storage import (
    LARGE,
    allocate,
    as_bytes,
    base_of,
    checksum,
    copied_with_strides,
    digest,
    in_a_row,
    is_held_elsewhere,
    is_plain,
    is_zero_tensor,
    memory_key,
    negative_view,
    span_of,
    sparse_parts,
    storage_key,
)
from tests.torch_contract.listeners import Functions, Operators

CPU, META = torch.device("cpu"), torch.device("meta")
MINUS_ZERO = [-0.0, float("nan"), 1.0]


def test_a_storage_of_bytes_has_as_many_as_were_asked_for() -> None:
    """c10/core/StorageImpl.h: a storage's nbytes are its tensor's; on meta it has no address."""
    for nbytes in (0, 1, 13, LARGE):
        storage = allocate(nbytes, CPU)
        assert (storage.nbytes(), storage.device) == (nbytes, CPU)
        assert storage.data_ptr() % 64 == 0
    assert (allocate(13, META).nbytes(), allocate(13, META).data_ptr()) == (13, 0)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the platform takes no advice")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's advice")
def test_the_address_of_a_large_storage_is_that_of_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """c10/core/impl/alloc_cpu.cpp: data_ptr points to nbytes of memory, which can be advised on."""
    asked: list[Any] = []
    monkeypatch.setattr(storages, "_madvise", lambda: lambda *advice: asked.append(advice))
    storage = allocate(LARGE + 1, CPU)
    ((start, length, advice),) = asked
    assert storage.data_ptr() <= start.value < start.value + length.value
    assert start.value + length.value <= storage.data_ptr() + storage.nbytes()
    assert advice == mmap.MADV_HUGEPAGE
    monkeypatch.undo()
    assert storages._madvise()(start, length, advice) in (0, -1)  # -1: the kernel has none


def test_conjugation_and_negation_are_bits_until_they_are_resolved() -> None:
    """aten/src/ATen/ConjugateFallback.cpp: conj sets a bit, and the memory is as it was."""
    tensor = torch.tensor([1 + 2j, 3 + 4j])
    seen = tensor.conj()
    assert seen.is_conj()
    assert seen.data_ptr() == tensor.data_ptr()
    row = in_a_row(seen)
    assert not row.is_conj()
    assert torch.view_as_real(row).tolist() == [[1, -2], [3, -4]]
    assert in_a_row(torch.arange(6).view(2, 3).t()).tolist() == [0, 3, 1, 4, 2, 5]


def test_one_element_of_any_stride_is_contiguous_and_yet_no_row_of_bytes() -> None:
    """aten/src/ATen/native/TensorConversions.cpp: view(dtype) wants the last stride to be 1."""
    tensor = torch.ones(1).as_strided((1,), (2,))
    assert tensor.is_contiguous()
    with pytest.raises(RuntimeError, match="must be 1 to view"):
        tensor.view(torch.uint8)
    assert as_bytes(tensor).tolist() == [0, 0, 128, 63]
    assert as_bytes(torch.ones(0, 3).t()).shape == (0,)


def test_a_digest_is_of_bits_and_heard_by_nobody() -> None:
    """torch/csrc/autograd/python_variable_methods: numpy() gives the very bytes of memory."""
    tensor = torch.tensor(MINUS_ZERO)
    with Functions() as functions, Operators() as ops:
        functions.heard.clear()
        found = digest(tensor)
    assert found == hashlib.sha256(bytes(tensor.untyped_storage().tolist())).digest()
    assert found != digest(tensor.abs())
    assert not functions.heard
    assert not ops.heard
    assert digest(tensor.to_sparse()) == digest(tensor.to_sparse().to_dense())


def test_a_checksum_is_of_the_bits_that_numpy_sees() -> None:
    """torch/csrc/utils/tensor_numpy.cpp: tensor_to_numpy shares the memory, row by row."""
    tensor = torch.tensor(MINUS_ZERO).bfloat16()
    assert checksum(tensor) == zlib.crc32(bytes(tensor.untyped_storage().tolist()))
    assert checksum(tensor) != checksum(tensor.abs())


def test_a_clone_does_not_keep_strides_that_overlap_and_ours_does() -> None:
    """aten/src/ATen/native/TensorFactories.cpp: clone preserves only dense, distinct strides."""
    expanded = torch.arange(3.0).expand(2, 3)
    assert expanded.clone().stride() != expanded.stride()
    for tensor in (expanded, torch.arange(8.0).view(2, 4)[:, 1::2], torch.ones(0, 3).t()):
        copy = copied_with_strides(tensor)
        assert copy.stride() == tensor.stride()
        assert torch.equal(copy, tensor)
        assert not copy.numel() or copy.data_ptr() != tensor.data_ptr()


def test_quantised_and_nested_tensors_say_that_they_are_strided() -> None:
    """c10/core/Layout.h: layout_from_backend calls quantised and nested backends Strided."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are on their way out, or on their way in
        quantised = torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)
        nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])
    assert quantised.layout is nested.layout is torch.strided
    assert [is_plain(t) for t in (torch.ones(2), quantised, nested)] == [True, False, False]
    assert not is_plain(torch.ones(2).to_sparse())


def test_a_storage_has_one_key_for_all_views_and_python_objects() -> None:
    """torch/csrc/StorageMethods.cpp: _cdata is the address of the StorageImpl."""
    tensor = torch.ones(4)
    key = storage_key(tensor.untyped_storage())
    assert storage_key(tensor[1:].detach().untyped_storage()) == key
    assert storage_key(torch.ones(4).untyped_storage()) != key


def test_a_negative_view_is_what_the_imaginary_part_of_a_conjugate_is() -> None:
    """aten/src/ATen/native/UnaryOps.cpp: _neg_view sets the bit that conj().imag has."""
    tensor = torch.tensor([1 + 2j])
    seen, made = tensor.conj().imag, negative_view(tensor.imag)
    assert seen.is_neg()
    assert made.is_neg()
    assert seen.tolist() == made.tolist() == [-2]
    assert made.data_ptr() == tensor.imag.data_ptr()


def test_the_parts_of_a_sparse_tensor_can_be_had_before_it_is_coalesced() -> None:
    """aten/src/ATen/native/sparse/SparseTensor.cpp: ``indices`` refuses, ``_indices`` does not."""
    sparse = torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (2,), check_invariants=True)
    with pytest.raises(RuntimeError, match="uncoalesced"):
        sparse.indices()
    assert [part.tolist() for part in sparse_parts(sparse)] == [[[0, 0]], [1.0, 2.0]]


def test_a_view_knows_the_tensor_that_it_shows() -> None:
    """torch/csrc/autograd/variable.h: ``_base`` is the first tensor, by whatever way of views."""
    tensor = torch.ones(4, requires_grad=True)
    assert base_of(tensor[1:][0]) is tensor
    assert base_of(tensor) is tensor
    assert base_of(tensor.detach()) is not tensor


def test_zeros_of_autograd_say_that_they_have_no_memory() -> None:
    """aten/src/ATen/native/TensorFactories.cpp: _efficientzerotensor, of forward-mode gradients."""
    assert is_zero_tensor(torch.ops.aten._efficientzerotensor([2]))
    assert not is_zero_tensor(torch.zeros(2))


def test_a_storage_is_asked_for_below_function_modes() -> None:
    """torch/overrides.py: a mode hears ``Tensor.untyped_storage``."""
    tensor = torch.ones(2)
    with Functions() as heard:
        assert memory_key(tensor[1:]) == memory_key(tensor)
    assert torch.Tensor.untyped_storage not in heard.heard


def test_span_is_that_of_the_memory_which_strides_reach() -> None:
    """c10/core/TensorImpl.h: an element is at the sum of index times stride."""
    tensor = torch.arange(24).as_strided((2, 3), (10, 2), 5)
    assert span_of(tensor.size(), tensor.stride()) == int(tensor.max() - tensor.min()) + 1


def test_a_storage_counts_all_that_hold_it() -> None:
    """c10/core/StorageImpl.h: tensors on it, and arrays by way of a tensor, hold it each."""
    tensor = torch.zeros(3)
    assert not is_held_elsewhere(tensor)
    array = tensor.numpy()
    assert is_held_elsewhere(tensor)
    del array
    view = tensor[:1]
    assert is_held_elsewhere(tensor)
    del view
    assert not is_held_elsewhere(tensor)
