"""MemMC-MAE (Tian et al., arXiv:2203.11725) in torch."""
