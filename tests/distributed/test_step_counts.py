"""What a step may ask of the device and of the network: a new wait or collective fails here before it costs a GPU."""

import tiny

MOST = {  # engine -> (waits: values that the host reads from tensors, collectives) of a step of two micro-batches
    "ZeRO-0-fp32": (0.0, 1.0),  # gradients
    "ZeRO-1-bf16": (0.0, 2.0),  # gradients; the new weights
    "ZeRO-2-bf16": (0.0, 2.0),
}


def test_a_step_makes_no_wait_and_no_collective_that_it_did_not_make_before(world_folder):
    found = tiny.torchrun(2, "counts", world_folder, *MOST)
    for engine, (waits, collectives) in MOST.items():
        assert found[engine]["waits"] <= waits and 0 < found[engine]["collectives"] <= collectives, found[engine]
        assert found[engine]["messages"] == 1.0, found[engine]  # norm and counters of the step: log2 of the ranks
