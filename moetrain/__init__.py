"""moetrain: pretraining of sparse mixture-of-experts language models."""

__version__ = "0.1.0"
