"""How far a prediction is from its target; what that is says models/noise/process.py."""

from torch import Tensor


def weighted_mse(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Returns the mean over the batch of weights (B,) times each sample's mean squared error, a float32 scalar.

    It divides by B, not by the sum of the weights: then micro-batches of equal size average to the global batch's mean
    whichever way it is cut.
    """
    error = squared_error(prediction, target)
    return (error * weights.to(error)).mean()


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared error of each sample, over its values, (B,) float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
