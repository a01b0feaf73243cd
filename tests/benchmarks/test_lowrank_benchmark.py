"""What the benchmark of lowrank compares with, and how it judges."""

import dataclasses

import torch

from benchmarks.lowrank import RANK, Case, Row, excess, judge, tensors

FINE = Row(
    case="tokens",
    chain=f"lowrank:{RANK}",
    rate=0.1,
    encode_s=1e-3,
    encode_least_s=1e-3,
    decode_s=1e-3,
    svd_s=1.0,
    excess=0.2,
    warm_excess=0.01,
)


def test_the_truncated_decomposition_has_no_excess():
    x = tensors(Case("small", (2, 24, 40)))[0]
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    best = (u[..., :RANK] * s[:, None, :RANK]) @ v[:, :RANK]
    assert abs(excess(best, x)) < 1e-3


def test_time_and_error_are_judged_of_lowrank_alone():
    assert [met for _, met in judge([FINE])] == [True, True]
    assert [met for _, met in judge([dataclasses.replace(FINE, encode_s=3e-3)])] == [False, True]
    assert [met for _, met in judge([dataclasses.replace(FINE, warm_excess=0.06)])] == [True, False]
    assert judge([dataclasses.replace(FINE, chain="lowrank:16+int8", encode_s=1.0)]) == []
