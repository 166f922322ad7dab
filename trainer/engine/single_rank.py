"""Gradients of a single rank, under DeepSpeed's stage 2.

DeepSpeed copies each gradient into a bucket, out of it again after a reduction that has nothing to reduce, together
into one flat tensor, and that to fp32: on a CPU a tenth of a ControlNet's step, on a GPU a gigabyte for the bucket.
Here each is added to its place in the flat fp32 tensor that the optimizer reads, as soon as it is there, and let go.
Gradients of several micro-batches are therefore added up in fp32 whatever the precision.
"""

from typing import Any

import torch
from torch import Tensor, nn

ROW = 2**14
"""Elements of a sum of squares in float32."""


class SingleRankGradients:
    """Takes over from a DeepSpeedZeroOptimizer of DeepSpeed 0.19 what happens between a backward pass and the step.

    Replaces its `process_gradients`, called with each parameter whose gradient has been computed, its
    `independent_gradient_partition_epilogue`, called at the end of each backward pass, and its `scaled_global_norm`.
    """

    def __init__(self, optimizer: Any) -> None:
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        self.optimizer = optimizer
        self.places: dict[nn.Parameter, Tensor] = {}
        """Views of the flat tensors, in the shapes of the parameters."""
        self.written: set[nn.Parameter] = set()
        """Parameters that have a gradient in `places` from this optimizer step."""
        self.handed_over = False
        self.groups: list[Any] = []
        """As DeepSpeed takes them: for each group of parameters its views, which know their flat tensor."""
        for number, group in enumerate(optimizer.params_in_partition):
            flat = torch.zeros(int(optimizer.partition_size[number]), dtype=torch.float32, device=optimizer.device)
            starts = optimizer.grad_partition_insertion_offset[number][0]
            for parameter in group:
                start = int(starts[optimizer.get_param_id(parameter)])
                self.places[parameter] = flat.narrow(0, start, parameter.numel()).view(parameter.shape)
            self.groups.append(GradPartitionBufferGroup([self.places[parameter] for parameter in group], flat))
        optimizer.scaled_global_norm = self.norm
        optimizer.process_gradients = self.add
        optimizer.independent_gradient_partition_epilogue = self.hand_over
        # Asked before the norm is taken, which is not finite either: there DeepSpeed looks again, and skips the step.
        no = torch.zeros(1, dtype=torch.bool, device=optimizer.device)
        optimizer.has_overflow_partitioned_grads_serial = lambda: no

    @torch.no_grad()
    def add(self, parameter: nn.Parameter, _group: int) -> None:
        if self.handed_over and not any(self.optimizer.averaged_gradients.values()):
            self.written.clear()  # the optimizer has used them, or thrown them away
            self.handed_over = False
        assert parameter.grad is not None, "DeepSpeed calls this when a gradient is there"
        if parameter in self.written:
            self.places[parameter].add_(parameter.grad)
        else:
            self.places[parameter].copy_(parameter.grad)
            self.written.add(parameter)
        parameter.grad = None

    def hand_over(self) -> None:
        """Gives the optimizer its gradients at the last micro-batch of a step."""
        self.optimizer._epilogue_ran_this_backward = True
        if not self.optimizer.is_gradient_accumulation_boundary():
            return
        for parameter, place in self.places.items():
            if parameter not in self.written:  # no loss depends on it, and an earlier step's gradient may be there
                place.zero_()
        self.optimizer.averaged_gradients.update(enumerate(self.groups))  # others hold this very dict
        self.handed_over = True

    def norm(self) -> Tensor:
        """Computes the Euclidean norm of all gradients, (), float64.

        DeepSpeed takes each gradient's in float64, which costs a CPU 15 ms for 15 million. In float32 a long sum loses
        digits there, 1 % of it over a hundred million, so the sums are short ones, and only they are added up exactly.
        """
        parts = []
        for group in self.groups:
            rows = group.flat_partition[: group.flat_partition.numel() // ROW * ROW].view(-1, ROW)
            rest = group.flat_partition[rows.numel() :]
            parts += [torch.linalg.vector_norm(rows, dim=1), torch.linalg.vector_norm(rest).reshape(1)]
        return torch.linalg.vector_norm(torch.cat(parts), dtype=torch.float64)
