"""Pure: what the network should predict, and how much each sample counts."""

from torch import Tensor

from controlbooth.data.errors import UserError


def training_target(
    prediction_type: str, latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The tensor that the prediction is compared with, (B, C, h, w).

    epsilon: the noise (arXiv 2006.11239, eq. 14). v_prediction: sqrt(a) noise - sqrt(1 - a) latents, with a the
    cumulative product of alphas at each timestep (arXiv 2202.00512, appendix D).
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        alpha = alphas_cumprod.to(latents)[timesteps][:, None, None, None]
        return alpha.sqrt() * noise - (1.0 - alpha).sqrt() * latents
    raise UserError(f"prediction_type {prediction_type!r} is not supported: epsilon or v_prediction")


def min_snr_weights(prediction_type: str, timesteps: Tensor, alphas_cumprod: Tensor, gamma: float) -> Tensor:
    """Min-SNR loss weights (arXiv 2303.09556, section 3.4), (B,) float32.

    timesteps: (B,) int64; alphas_cumprod: (T,) float32. In terms of the predicted clean latents the weight is
    min(SNR, gamma); predicting noise divides it by SNR, predicting v by SNR + 1.
    """
    alpha = alphas_cumprod[timesteps].float()
    snr = alpha / (1.0 - alpha)
    divisor = snr if prediction_type == "epsilon" else snr + 1.0
    return snr.clamp(max=gamma) / divisor


def weighted_mse(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Mean over the batch of weights (B,) times each sample's mean squared error, in float32. A scalar.

    It divides by B, not by the sum of the weights: then micro-batches of equal size average to the global batch's mean
    whichever way it is cut.
    """
    error = squared_error(prediction, target)
    return (error * weights.to(error)).mean()


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over each sample's values, in float32, (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
