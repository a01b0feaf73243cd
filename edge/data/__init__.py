"""Data sets and their loading: open a set by name, read batches of it ahead of training.

`edge.data.datasets` opens sets, `edge.data.loader` reads batches. Importing this package imports no torch.
"""
