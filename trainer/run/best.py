"""By which figure checkpoints are compared. Free of torch."""

from collections.abc import Iterable, Mapping

FIGURES = ("segmentation_miou", "depth_delta", "pose_pck", "line_f1", "edge_f1", "mask_iou")
"""Of the validation, by which control is told; the first one that a run has. Those before edge_f1 are measured only of
the kind that is trained on, and edge_f1 is that of edges, so a kind's own figure comes before the others."""


def best_by(measured: Iterable[Mapping[str, float]]) -> str | None:
    """Returns the figure by which checkpoints are compared: the first of FIGURES that any of them has; None where none
    of these was measured.

    measured: the metrics in their state.json.
    """
    names = {name for metrics in measured for name in metrics}
    return next((figure for figure in FIGURES if figure in names), None)
