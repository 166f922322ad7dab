import gc

import numpy as np
import torch

from controlbooth.data.loading.buffers import Buffers


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_no_view_of_it_is_left():
    buffers = Buffers()
    first = buffers.empty((4, 3, 8, 8))
    where, row = address(first), first[2, 1]
    del first
    assert address(buffers.empty((4, 3, 8, 8))) != where  # the row looks at it still
    del row
    both = [buffers.empty((4, 3, 8, 8)) for _ in range(2)]
    assert where in map(address, both) and not np.shares_memory(*both)
    assert both[0].shape == (4, 3, 8, 8) and both[0].dtype == np.uint8


def test_a_tensor_made_from_a_view_keeps_the_memory():
    buffers = Buffers()
    tensor = torch.from_numpy(buffers.empty((2, 6))[1])
    where = tensor.data_ptr() - 6
    assert address(buffers.empty((2, 6))) != where
    tensor = tensor[2:]
    assert address(buffers.empty((2, 6))) != where
    tensor = tensor.clone()
    held = [buffers.empty((2, 6)) for _ in range(2)]
    assert where in map(address, held)


def test_as_much_is_kept_as_was_in_use_and_shapes_that_grow_replace_what_is_too_small():
    gc.collect()
    gc.freeze()  # else each of 50 collections looks through all that was imported
    buffers = Buffers()
    for step in range(50):
        arrays = [buffers.empty((8, 10 + step % 7)) for _ in range(3)]
        assert all(not np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])
        del arrays
        gc.collect()
        assert len(buffers._kept) <= 3
    assert sum(owner.size for owner in buffers._kept) == 3 * 8 * 16
