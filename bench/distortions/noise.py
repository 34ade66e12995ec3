"""Noise: independent at every pixel and channel. Hendrycks and Dietterich (ICLR 2019), section 4.1 and appendix B."""

from __future__ import annotations

import numpy as np

from robustboard.bench.distortions.canvas import Draws, Pixels


def gaussian_noise(images: Pixels, sigma: float, *, draws: Draws) -> Pixels:
    """Normal noise, as in low light."""
    return images + sigma * draws.normal(*images.shape[1:])


def shot_noise(images: Pixels, photons: float, *, draws: Draws) -> Pixels:
    """Poisson noise: white is that many photons on average."""
    return draws.poisson(images * photons) / photons


def impulse_noise(images: Pixels, amount: float, *, draws: Draws) -> Pixels:
    """Salt and pepper: this share of all values becomes 0 or 1, each half of the time."""
    struck, salt = np.moveaxis(draws.uniform(2, *images.shape[1:]), 1, 0)
    return np.where(struck < amount, np.where(salt < 0.5, 0.0, 1.0), images)


def speckle_noise(images: Pixels, sigma: float, *, draws: Draws) -> Pixels:
    """Normal noise in proportion to the value."""
    return images + images * sigma * draws.normal(*images.shape[1:])
