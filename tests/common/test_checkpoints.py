"""Checkpoints appear whole or not at all, whatever is killed, full or broken; and come back as they were."""

import errno
import json
import os
import re
import resource
import stat
import struct
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from common.checkpoints import CheckpointFolder
from common.errors import CheckpointFailed, IsthmusError, UserError
from common.safetensors_file import data_of, read_header
from tests.common.failing_disk import ERRORS, FailingDisk, Killed, KilledDisk, WatchedDisk
from tests.common.test_snapshot import assert_same, states

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {"model": {"name": "net"}, "optim": {"lr": 0.1, "betas": [0.9, 0.999]}}
PIECE = 600
"""The most bytes of one write, so that a checkpoint takes some."""


def state_of(step):
    """A state that differs from step to step in every tensor."""
    return {
        "weights": torch.full((4, 3, 5, 5), float(step)).contiguous(memory_format=torch.channels_last),
        "momenta": {0: torch.full((64,), step, dtype=torch.float64), 1: torch.tensor(step)},
        "rates": [0.1 * step, None, (step, float("inf"))],
    }


def folder_with(path, *steps, **options):
    folder = CheckpointFolder(path, **options)
    for step in steps:
        folder.write(step, state_of(step), ABOUT | {"step": step})
    return folder


def assert_whole(folder, *steps):
    """Exactly these are listed, and each is what was written; nothing else is in the folder."""
    assert folder.steps() == list(steps)
    for step in steps:
        state, about = folder.read(step)
        assert_same(state, state_of(step))
        assert about == ABOUT | {"step": step}
    assert sorted(os.listdir(folder.path)) == [folder.file_of(step).name for step in steps]


# What is written comes back.


def test_checkpoints_come_back_as_they_were_written(tmp_path):
    folder = folder_with(tmp_path / "some" / "where", 0, 7, 120)
    assert_whole(folder, 0, 7, 120)
    assert_whole(CheckpointFolder(folder.path), 0, 7, 120)


@settings(deadline=None, max_examples=60)
@given(state=states)
def test_any_state_comes_back(tmp_path_factory, state):
    folder = CheckpointFolder(tmp_path_factory.mktemp("any"))
    folder.write(3, state, {})
    assert_same(folder.read(3)[0], state)


def test_a_step_that_is_written_again_replaces_what_was_there(tmp_path):
    folder = folder_with(tmp_path, 7)
    folder.write(7, [1], {})
    assert folder.read(7) == ([1], {})
    assert folder.steps() == [7]


def test_what_was_read_has_nothing_to_do_with_the_file_any_more(tmp_path):
    folder = folder_with(tmp_path, 7)
    state, _ = folder.read(7)
    folder.file_of(7).write_bytes(bytes(folder.file_of(7).stat().st_size))
    assert_same(state, state_of(7))


def test_the_library_reads_the_file_whatever_memory_its_tensors_share(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    tensors = {
        "whole": whole,
        "rows": whole[1:3],
        "turned": whole.T,
        "one": torch.tensor(True),
        "none": torch.empty(0, 3),
        "half": torch.ones(3).bfloat16(),
    }
    folder = CheckpointFolder(tmp_path)
    folder.write(1, tensors, ABOUT)
    read = load_file(folder.file_of(1))
    assert read.pop("__checksum__").shape == (4,)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)
        assert read[name].dtype == tensor.dtype
    with safe_open(folder.file_of(1), "pt") as file:
        assert json.loads(file.metadata()["about"]) == ABOUT


def test_a_tensor_goes_to_the_file_without_a_copy_in_memory(tmp_path):
    tensor = torch.zeros(1000)
    view = data_of(tensor)
    tensor.fill_(1)
    assert bytes(view) == struct.pack("f", 1.0) * 1000

    seen = []

    class Looking(WatchedDisk):
        def write(self, descriptor, data):
            seen.append(data.nbytes)
            return super().write(descriptor, data)

    CheckpointFolder(tmp_path, disk=Looking()).write(1, [torch.zeros(1000), torch.zeros(500)], {})
    assert seen[1:] == [4000, 2000, 4]


def test_only_their_owner_may_read_them(tmp_path):
    before = os.umask(0)
    try:
        folder = folder_with(tmp_path / "mine", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.file_of(1).stat().st_mode) == 0o600


def test_the_data_are_on_the_disk_before_the_name_is(tmp_path):
    disk = WatchedDisk(PIECE)
    folder_with(tmp_path, 1, disk=disk)
    short = [name for name, after in zip(disk.calls, [*disk.calls[1:], ""], strict=True) if name != after]
    assert short == ["make_folder", "create", "lock", "write", "sync", "close", "rename", "sync_folder"]
    assert disk.calls.count("write") > 3


# How many are kept.


@pytest.mark.parametrize(
    ("keep", "keep_step", "left"),
    [
        (2, None, [4, 5]),
        (2, 5, [4, 5]),
        (2, 1, [1, 4, 5]),
        (1, 3, [3, 5]),
        (9, None, [1, 2, 3, 4, 5]),
        (2, 99, [4, 5]),
    ],
)
def test_the_last_few_stay_and_the_one_that_both_sides_have(tmp_path, keep, keep_step, left):
    folder = folder_with(tmp_path, 1, 2, 3, 4, 5, keep=keep)
    folder.prune(keep_step)
    assert_whole(folder, *left)


@pytest.mark.parametrize(("step", "left"), [(0, []), (2, [2]), (3, [2]), (9, [2, 4, 6])])
def test_a_future_that_is_given_up_is_removed_from_its_end(tmp_path, step, left):
    disk = WatchedDisk()
    folder = folder_with(tmp_path, 2, 4, 6, disk=disk)
    disk.calls.clear()
    folder.drop_after(step)
    assert_whole(folder, *left)
    assert disk.calls == ["remove"] * (3 - len(left)) + ["sync_folder"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(4))
def test_a_kill_while_a_future_is_removed_leaves_no_gap(tmp_path, at, when):
    folder_with(tmp_path, 2, 4, 6, 8)
    folder = CheckpointFolder(tmp_path, disk=KilledDisk(1 + at, when, PIECE))
    with pytest.raises(Killed):
        folder.drop_after(2)
    assert CheckpointFolder(tmp_path).steps() == [2, 4, 6, 8][: 4 - min(at + (when == "after"), 3)]


# Files that are no checkpoints.


def damages(whole):
    """Contents that a whole file may have been turned into, by name."""
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])

    def with_header(changed):
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    def with_metadata(**changed):
        return with_header(header | {"__metadata__": header["__metadata__"] | changed})

    return {
        "empty": b"",
        "7 bytes": whole[:7],
        "8 bytes": whole[:8],
        "half a header": whole[: 8 + length // 2],
        "no data": whole[: 8 + length],
        "one byte less": whole[:-1],
        "one byte more": whole + b"\0",
        "zeros": bytes(len(whole)),
        "ones": b"\xff" * len(whole),
        "a longer header than there is": struct.pack("<Q", len(whole)) + whole[8:],
        "an endless header": struct.pack("<Q", (1 << 64) - 1) + whole[8:],
        "no JSON": whole[:8] + b"?" * length + whole[8 + length :],
        "deep JSON": struct.pack("<Q", 200_000) + b"[" * 200_000,
        "a list": with_header([1]),
        "no metadata": with_header({k: v for k, v in header.items() if k != "__metadata__"}),
        "odd metadata": with_header(header | {"__metadata__": [1]}),
        "numbers as metadata": with_metadata(version=1),
        "odd tensor": with_header(header | {"weights": 3}),
        "odd offsets": with_header(header | {"weights": {"data_offsets": ["x", "y"]}}),
        "another version": with_metadata(version="1"),
        "another program's": with_metadata(format="pt"),
        "another step's": with_metadata(step="8"),
    }


def test_a_file_that_is_no_whole_checkpoint_is_passed_over_and_not_read(tmp_path):
    folder = folder_with(tmp_path, 6, 7)
    path = folder.file_of(7)
    for name, data in damages(path.read_bytes()).items():
        path.write_bytes(data)
        assert folder.steps() == [6], name
        with pytest.raises(UserError, match=re.escape(str(path))) as refused:
            folder.read(7)
        assert "\n" not in str(refused.value), name
        folder.prune()
        assert path.exists(), name
    folder.write(7, state_of(7), ABOUT | {"step": 7})
    assert_whole(folder, 6, 7)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_file_with_any_bytes_changed_or_cut_off_never_crashes(tmp_path_factory, data):
    folder = folder_with(tmp_path_factory.mktemp("changed"), 7)
    path = folder.file_of(7)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 8 + length - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    assert folder.steps() in ([], [7])
    with suppress(UserError):
        folder.read(7)


def test_a_state_that_does_not_fit_its_tensors_is_called_damaged(tmp_path):
    folder = folder_with(tmp_path, 7)
    path = folder.file_of(7)
    path.write_bytes(path.read_bytes().replace(b'"weights":', b'"weighty":'))
    assert folder.steps() == [7]
    with pytest.raises(UserError, match="is damaged"):
        folder.read(7)


@pytest.mark.parametrize("at", ["state", "weights", "checksum"])
def test_a_file_that_was_damaged_since_is_found_out_and_left_alone(tmp_path, at):
    folder = folder_with(tmp_path, 5, 6, 7, keep=2)
    path, said = folder.file_of(7), []
    content = bytearray(path.read_bytes())
    content[{"state": content.index(b"map"), "weights": len(content) // 2, "checksum": -1}[at]] ^= 1
    path.write_bytes(content)
    folder = CheckpointFolder(tmp_path, keep=2)
    assert folder.steps() == [5, 6, 7]  # so much is seen from its beginning
    with pytest.raises(UserError, match=f"{path} is damaged"):
        folder.read(7)
    folder.check(said.append)
    folder.check(said.append)
    assert folder.steps() == [5, 6]
    assert len(said) == 1
    assert f"{path} IS DAMAGED" in said[0]
    folder.drop_after(6)
    folder.prune()
    assert path.exists()
    assert folder.steps() == [5, 6]  # it does not count as one of those that are kept
    folder.write(7, state_of(7), ABOUT | {"step": 7})
    assert_whole(folder, 5, 6, 7)


def test_a_file_that_cannot_be_read_for_now_is_passed_over_for_now(tmp_path, monkeypatch):
    folder, said = folder_with(tmp_path, 6, 7), []
    folder = CheckpointFolder(tmp_path)

    def fail(path):
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("common.checkpoints.is_sound", fail)
        folder.check(said.append)
    assert folder.steps() == []
    assert folder.named() == [6, 7]
    assert all("CANNOT BE READ: too many open files" in line for line in said)
    folder.check(pytest.fail)
    assert folder.steps() == [6, 7]


def test_what_was_written_or_checked_by_the_same_object_is_not_read_again(tmp_path, monkeypatch):
    folder_with(tmp_path, 6)
    folder, read = folder_with(tmp_path, 7), []
    monkeypatch.setattr("common.checkpoints.is_sound", lambda path: read.append(path) or True)
    folder.check(pytest.fail)
    folder.check(pytest.fail)
    assert read == [folder.file_of(6)]


def test_files_of_other_names_and_kinds_are_left_alone(tmp_path):
    folder = folder_with(tmp_path, 7)
    (tmp_path / "step-12.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".step-0000000007.safetensors.bak").write_text("mine")
    (tmp_path / "step-0000000009.safetensors").mkdir()
    (tmp_path / "step-0000000008.safetensors").symlink_to("nowhere")
    there = set(os.listdir(tmp_path))
    folder = CheckpointFolder(tmp_path, keep=1)
    assert folder.steps() == [7]
    folder.prune()
    assert set(os.listdir(tmp_path)) == there


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    folder = folder_with(tmp_path, 6, 7)
    with pytest.raises(UserError, match=r"no checkpoint of step 8 in .*; there are: 6, 7$"):
        folder.read(8)


# Killed at any call.


def calls_of_a_write(path):
    """How many calls opening a folder and writing one checkpoint make."""
    disk = WatchedDisk(PIECE)
    folder_with(path, 2, disk=disk)
    return len(disk.calls)


@pytest.mark.parametrize("when", ["before", "middle", "after"])
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(tmp_path, when):
    count = calls_of_a_write(tmp_path / "clean")
    seen = set()
    for at in range(count):
        path = tmp_path / str(at)
        folder_with(path, 1)
        disk = KilledDisk(at, when, PIECE)
        with pytest.raises(Killed):
            folder_with(path, 2, disk=disk)
        disk.bury()
        folder = CheckpointFolder(path)
        steps = folder.steps()
        assert_whole(folder, *steps)
        assert steps in ([1], [1, 2])
        seen.add(tuple(steps))
        folder.write(2, state_of(2), ABOUT | {"step": 2})
        assert_whole(folder, 1, 2)
    assert seen == {(1,), (1, 2)}


@pytest.mark.parametrize("when", ["before", "middle", "after"])
def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_or_the_new_one(tmp_path, when):
    count = calls_of_a_write(tmp_path / "clean")
    for at in range(count):
        path = tmp_path / str(at)
        CheckpointFolder(path).write(2, [torch.ones(3)], {})
        disk = KilledDisk(at, when, PIECE)
        with pytest.raises(Killed):
            folder_with(path, 2, disk=disk)
        disk.bury()
        folder = CheckpointFolder(path)
        assert folder.steps() == [2]
        if folder.read(2)[1]:
            assert_whole(folder, 2)
        else:
            assert_same(folder.read(2), ([torch.ones(3)], {}))


def test_what_a_dead_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    dead = tmp_path / ".step-0000000005.safetensors.0123456789abcdef.tmp"

    class Another(WatchedDisk):
        """Another process opens the folder at every call of the writer."""

        def around(self, name, call, *arguments):
            done = super().around(name, call, *arguments)
            if name in ("lock", "write", "sync"):
                dead.write_bytes(b"half")
                assert CheckpointFolder(tmp_path).steps() == [1]
                assert not dead.exists()
            return done

    folder_with(tmp_path, 1)
    folder_with(tmp_path, 2, disk=Another(PIECE))
    assert_whole(CheckpointFolder(tmp_path), 1, 2)


KILLS = """
import os, random, signal, sys
from pathlib import Path
import torch
from common.checkpoints import CheckpointFolder
from common.disk import Disk

torch.set_num_threads(1)
path, drawn = Path(sys.argv[1]), random.Random(int(sys.argv[2]))


def write_forever(told):
    class Telling(Disk):
        def write(self, descriptor, data):
            os.write(told, b".")
            return super().write(descriptor, data[: 1 << 14])

    folder = CheckpointFolder(path, disk=Telling())
    step = max(folder.steps(), default=0)
    while True:
        step += 1
        folder.write(step, {"a": torch.full((40_000,), step), "step": step}, {"step": step})
        folder.prune()


newest = 0
for round in range(25):
    hears, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            write_forever(told)
        finally:
            os._exit(1)
    os.close(told)
    for _ in range(drawn.randrange(1, 150)):
        assert os.read(hears, 1)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    os.close(hears)
    folder = CheckpointFolder(path)
    steps = folder.steps()
    assert sorted(os.listdir(path)) == [folder.file_of(step).name for step in steps]
    for step in steps:
        state, about = folder.read(step)
        assert about == {"step": step} and state["step"] == step
        assert torch.equal(state["a"], torch.full((40_000,), step))
    assert max(steps, default=0) >= newest
    newest = max(steps, default=0)
assert newest > 25, newest
"""


def test_a_process_killed_again_and_again_while_it_writes_never_leaves_a_broken_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# Full and broken disks.


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("lasting", [False, True])
def test_an_error_at_any_call_is_told_in_a_line_and_costs_nothing_else(tmp_path, error, lasting):
    count = calls_of_a_write(tmp_path / "clean") - 1  # opening the folder succeeds here
    for at in range(count):
        folder = folder_with(tmp_path / str(at), 1)
        disk = FailingDisk(ERRORS[error], lambda n, name, at=at: n == at or (lasting and n > at), PIECE)
        folder._disk = disk
        with pytest.raises(
            CheckpointFailed, match="the checkpoint of step 2 could not be written in"
        ) as failed:
            folder.write(2, state_of(2), ABOUT | {"step": 2})
        assert os.strerror(ERRORS[error]).lower() in str(failed.value)
        assert "\n" not in str(failed.value)
        assert isinstance(failed.value, IsthmusError)
        assert not disk.open
        steps = folder.steps()
        assert steps == ([1, 2] if at == count - 1 else [1])
        # What could not be removed at once goes with the next opening of the folder.
        folder = folder if not lasting else CheckpointFolder(folder.path)
        assert_whole(folder, *steps)
        folder._disk = WatchedDisk()
        folder.write(2, state_of(2), ABOUT | {"step": 2})
        folder.write(3, state_of(3), ABOUT | {"step": 3})
        assert_whole(folder, 1, 2, 3)


def test_a_disk_that_fills_up_in_the_middle_of_a_write_is_told(tmp_path):
    folder = folder_with(tmp_path, 1)
    writes = []

    class Filling(WatchedDisk):
        def write(self, descriptor, data):
            writes.append(data.nbytes)
            if len(writes) > 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(descriptor, data[: max(1, len(data) // 2)])

    folder._disk = Filling()
    with pytest.raises(CheckpointFailed, match="no space left on device"):
        folder.write(2, state_of(2), {})
    assert_whole(folder, 1)


def test_a_write_is_whole_however_few_bytes_the_disk_takes_at_a_time(tmp_path):
    folder = folder_with(tmp_path, 1, disk=WatchedDisk(7))
    assert_whole(folder, 1)


@pytest.mark.parametrize("error", ERRORS)
def test_a_checkpoint_that_cannot_be_removed_is_told(tmp_path, error):
    folder = folder_with(tmp_path, 1, 2, 3, keep=1)
    for name in ("remove", "sync_folder"):
        folder._disk = FailingDisk(ERRORS[error], lambda n, called, name=name: called == name, PIECE)
        with pytest.raises(CheckpointFailed, match=r"old checkpoints in .* could not be removed"):
            folder.drop_after(2)
    assert_whole(folder, 1, 2)
    folder._disk = FailingDisk(ERRORS[error], lambda n, called: called == "remove", PIECE)
    with pytest.raises(CheckpointFailed, match="old checkpoints"):
        folder.prune()
    assert_whole(folder, 1, 2)


@contextmanager
def largest_file(size):
    """No file of this process grows beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_of_the_system_on_files_is_told_as_a_full_disk_is(tmp_path):
    folder = folder_with(tmp_path, 1)
    with (
        largest_file(folder.file_of(1).stat().st_size - 100),
        pytest.raises(CheckpointFailed, match="file too large"),
    ):
        folder.write(2, state_of(2), {})
    assert_whole(folder, 1)
    folder.write(2, state_of(2), ABOUT | {"step": 2})
    assert_whole(folder, 1, 2)


def test_a_disk_that_is_really_full_is_told_and_the_old_one_stays(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        folder = folder_with(tmp_path, 1)
        with pytest.raises(CheckpointFailed, match="no space left on device"):
            folder.write(2, [torch.zeros(1 << 16)], {})
        assert_whole(folder, 1)
        folder.write(2, state_of(2), ABOUT | {"step": 2})
        assert_whole(folder, 1, 2)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_folder_that_is_gone_is_told_and_not_made_again(tmp_path):
    folder = folder_with(tmp_path / "here", 1)
    folder.path.rename(tmp_path / "elsewhere")
    for act in (folder.steps, folder.prune, lambda: folder.write(2, [], {}), lambda: folder.read(1)):
        with pytest.raises(CheckpointFailed, match="no such file or directory"):
            act()
    assert not folder.path.exists()


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointFailed, match="there can be no checkpoints in"):
            CheckpointFolder(path)


def test_a_header_names_the_tensors(tmp_path):
    header = read_header(folder_with(tmp_path, 1).file_of(1))
    assert set(header.names) == {"weights", "momenta.0", "momenta.1", "__checksum__"}
