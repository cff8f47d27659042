"""laavit: latent visual reasoning, in parts that are swapped by name."""

__version__ = "0.1.0"
