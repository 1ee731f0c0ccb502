"""erv-min: emotion-coherent reasoning with an Emotional Rationale Verifier (arXiv 2510.23506), from scratch."""

__version__ = "0.1.0"
