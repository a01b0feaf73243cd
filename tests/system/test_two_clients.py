"""Clients that share a server do not see each other."""

from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors.torch import load_file

from tests.system.processes import serving, train


def test_a_run_is_the_same_to_the_bit_while_others_come_and_go(tmp_path):
    """While one session built its model, modules of the other failed: torch's tracer answers for all threads."""
    with serving("--import", "dropout_model") as (server, address):
        alone = train(address, "--steps", 40, "--save", tmp_path / "alone.safetensors")
        with ThreadPoolExecutor(2) as pool:
            long = pool.submit(train, address, "--steps", 40, "--save", tmp_path / "beside.safetensors")
            others = [pool.submit(train, address, "--steps", 1, "--seed", seed) for seed in range(6)]
            ended = [alone, long.result(), *(other.result() for other in others)]
        assert "Traceback" not in server.err
    assert [(one.status, one.err) for one in ended] == [(0, "")] * 8
    expected, came = (load_file(tmp_path / f"{name}.safetensors") for name in ("alone", "beside"))
    assert expected.keys() == came.keys()
    assert all(torch.equal(expected[name], came[name]) for name in expected)
