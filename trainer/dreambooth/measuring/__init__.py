"""Measuring subjects as the paper does: fidelity, prompts, preservation of the class, overfitting."""
