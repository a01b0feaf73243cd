"""Wrong command lines: one line that says what to do, exit status 2, and nothing touched."""

import re
import subprocess
import sys

import pytest
from PIL import Image

from common.errors import UserError
from edge.config import TrainConfig, parse_address
from tests.system.processes import TINY, assert_serves, run, serving

NOWHERE = ("--server", "127.0.0.1:1")


@pytest.fixture(scope="module")
def address():
    with serving("--import", "dropout_model") as (server, address):
        yield address
        assert "Traceback" not in server.err


def refusal(script, *arguments):
    """What a command says that is refused for its command line."""
    ended = run(script, *arguments)
    assert ended.status == 2, ended
    assert ended.out == ""
    return ended.error


WRONG_OPTIONS = {
    "no server": ((), "--server HOST:PORT"),
    "no such option": ((*NOWHERE, "--chunk", "8"), "--chunks"),
    "no such command": (("trian",), "trian"),
    "a word for a number": ((*NOWHERE, "--steps", "many"), "'many' is not a valid integer"),
    "an option without its value": ((*NOWHERE, "--steps"), "--steps"),
    "no such optimizer": ((*NOWHERE, "--optimizer", "adam"), "'sgd', 'adamw'"),
    "no such schedule": ((*NOWHERE, "--schedule", "step"), "'cosine'"),
    "a port out of range": (("--server", "127.0.0.1:99999"), "give HOST:PORT"),
    "a port that is a word": (("--server", "cloud:http"), "give HOST:PORT"),
    "a URL for a server": (("--server", "http://cloud:7433"), "give HOST:PORT"),
    "a bare IPv6 address": (("--server", "fd00::5"), "[fd00::5]:7433"),
    "one cut": ((*NOWHERE, "--cut", "features.1"), "give --cut twice"),
    "a batch smaller than the chunk count": ((*NOWHERE, "--batch-size", "4"), "--chunks 4 or fewer"),
    "a seed too large": ((*NOWHERE, "--seed", str(2**63)), "--seed must be at most"),
    "no steps": ((*NOWHERE, "--steps", "0"), "--steps must be at least 1"),
    "less than no depth": ((*NOWHERE, "--depth", "-1"), "--depth must be at least 1"),
    "options before the demo's name": (("--steps", "3", "demo"), "--steps stands before demo"),
    "a file for a directory": ((*NOWHERE, "--save", "."), "is a directory"),
    "a model into a directory that is not there": ((*NOWHERE, "--save", "no/m.st"), "there is no directory no"),
    "metrics into a directory that is not there": ((*NOWHERE, "--metrics", "no/m.js"), "there is no directory no"),
    "a trace into a directory that is not there": ((*NOWHERE, "--trace", "no/t.js"), "there is no directory no"),
    "no such module": ((*NOWHERE, "--import", "no_models"), "--import no_models"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS)
def test_wrong_option_is_one_line_that_says_what_is_right(arguments, says):
    assert says in refusal("edge-client", *arguments)


WRONG_CHOICES = {
    "an unknown model": (("--model", "mobilenet_v4"), "mobilenet_v2"),
    "an unknown cut": (("--cut", "stemm", "--cut", "blocks"), "stem"),
    "a cut after the end": (("--cut", "stem", "--cut", "head.9"), "head"),
    "cuts in the wrong order": (("--cut", "blocks", "--cut", "stem"), "before"),
    "an unknown codec": (("--compress", "int9"), "int8"),
    "an unknown codec after a bottleneck": (("--compress", "conv+zip"), "lz4"),
    "an unknown place": (("--compress", "cut3=int8"), "cut1, cut2, act, grad"),
    "a bottleneck in one direction": (("--compress", "grad=conv"), "cut1=conv"),
    "a bottleneck after a codec": (("--compress", "int8+conv"), "conv+int8"),
    "everything set twice": (("--compress", "int8", "--compress", "fp16"), "twice"),
    "widths that do not parse": (("--compress", "conv:20y3"), "character"),
    "an unknown data set": (("--data", "digit"), "digits, cifar10"),
    "a data folder that is not there": (("--data", "folder:/no/such"), "/no/such"),
    "a limit of no samples": (("--train-limit", "0"), "train-limit"),
    "too few classes": (("--num-classes", "3"), "digits has 10 classes"),
    "a learning rate below nothing": (("--lr", "-1"), "learning rate must be above 0"),
    "a warm-up longer than the run": (("--schedule", "cosine", "--warmup-steps", "9", "--steps", "4"), "steps in all"),
    "weights that are not there": (("--weights", "no/such.safetensors"), "no/such.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), WRONG_CHOICES.values(), ids=WRONG_CHOICES)
def test_wrong_choice_is_one_line_that_says_which_exist(address, arguments, says):
    tiny = TINY
    if arguments[0] == "--cut":
        tiny = tuple(word for word in TINY if word not in ("--cut", "stem", "blocks"))
    assert says in refusal("edge-client", "--server", address, *tiny, *arguments)


def test_model_that_is_like_no_other_is_answered_with_all_there_are(address):
    said = refusal("edge-client", "--server", address, "--model", "qqq")
    assert "alexnet" in said
    assert "wide_resnet50_2" in said


def test_unknown_weights_of_a_known_model_are_answered_with_those_that_exist(address):
    assert "IMAGENET1K_V1" in refusal("edge-client", "--server", address, "--weights", "IMAGENET")


@pytest.mark.parametrize(
    "arguments",
    [("--batch-size", "8", "--chunks", "8", "--steps", "1"), ("--train-limit", "41", "--batch-size", "32")],
    ids=["in every batch", "in an epoch's last batch"],
)
def test_chunk_of_one_sample_that_cannot_be_normalised_is_found_before_training(address, arguments):
    said = refusal("edge-client", "--server", address, "--image-size", "32", *arguments)
    assert "mobilenet_v2 cannot train on a chunk of one sample at 32 px" in said
    assert "change --batch-size, --chunks or --image-size" in said


def test_model_without_preset_cuts_is_cut_where_that_is_good(address):
    tiny = (
        "--image-size",
        16,
        "--train-limit",
        16,
        "--test-limit",
        8,
        "--batch-size",
        8,
        "--chunks",
        2,
        "--steps",
        1,
    )
    model = ("--import", "dropout_model", "--model", "dropout_net")
    ended = run("edge-client", "--server", address, *model, *tiny)
    assert (ended.status, ended.err) == (0, "")
    assert "cut after stem.1 and blocks.4" in ended.out


def test_refused_run_leaves_the_files_of_the_last_one(address, tmp_path):
    files = {name: tmp_path / name for name in ("save", "metrics", "trace")}
    for path in files.values():
        path.write_text("of the last run")
    outputs = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    refusal("edge-client", "--server", address, *TINY, "--lr", "-1", *outputs)
    assert run("edge-client", *NOWHERE, *TINY, *outputs).status == 1
    assert {path.read_text() for path in files.values()} == {"of the last run"}
    assert len(list(tmp_path.iterdir())) == 3


# Folders of images.


def image_folder(path, *, splits=("train", "test"), classes=("cat", "dog"), images=4):
    for split in splits:
        (path / split).mkdir(parents=True)
        for label in classes:
            (path / split / label).mkdir()
            for number in range(images):
                Image.new("RGB", (20, 20), (number, 0, 0)).save(path / split / label / f"{number}.png")
    return f"folder:{path}"


BAD_FOLDERS = {
    "without a test set": ({"splits": ("train",)}, "has no test/"),
    "without classes": ({"classes": ()}, "holds no classes"),
    "with a class without images": ({"images": 0}, "holds no images"),
}


@pytest.mark.parametrize(("contents", "says"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_folder_that_is_no_data_set_says_what_it_lacks(address, tmp_path, contents, says):
    data = image_folder(tmp_path / "data", **contents)
    assert says in refusal("edge-client", "--server", address, *TINY, "--data", data)


def test_classes_that_differ_are_named(address, tmp_path):
    data = image_folder(tmp_path / "data")
    (tmp_path / "data/test/dog").rename(tmp_path / "data/test/hound")
    said = refusal("edge-client", "--server", address, *TINY, "--data", data)
    assert "dog" in said
    assert "hound" in said


# The server's.

WRONG_SERVERS = {
    "a GPU that is not there": (("--gpu", "99"), "there is no GPU 99"),
    "a GPU and the CPU": (("--gpu", "0", "--cpu"), "--gpu and --cpu exclude each other"),
    "a port out of range": (("--port", "70000"), "70000"),
    "a port that is a word": (("--port", "http"), "'http'"),
    "no such option": (("--prot", "1"), "--port"),
    "a word too many": (("start",), "start"),
    "no such module": (("--import", "no_models"), "no_models"),
    "no threads": (("--threads", "0"), "0"),
}


@pytest.mark.parametrize(("arguments", "says"), WRONG_SERVERS.values(), ids=WRONG_SERVERS)
def test_wrong_server_option_is_one_line(arguments, says):
    assert says in refusal("cloud-server", *arguments)


def test_address_of_another_machine_is_refused_in_the_last_line():
    ended = run("cloud-server", "--cpu", "--insecure", "--host", "203.0.113.7")
    assert ended.status == 2
    assert ended.out == ""
    assert ended.err.splitlines()[-1].startswith(
        "error: cannot listen on 203.0.113.7:7433: that address is not"
    )
    assert "Traceback" not in ended.err


def test_port_in_use_is_one_line_and_the_first_server_goes_on(address):
    said = refusal("cloud-server", "--cpu", "--port", address.rpartition(":")[2])
    assert "another program listens on that port" in said
    assert_serves(address)


# Help.

DESIGNED = {
    "edge-client": (
        *("--server", "--compress", "--model", "--data", "--image-size", "--num-classes", "--batch-size"),
        *("--chunks", "--epochs", "--steps", "--seed", "--save", "--metrics", "demo"),
        *("--bottleneck", "calibrate", "flops", "--token-file", "--tls", "--tls-fingerprint", "--tls-ca"),
        *("--tls-cert", "--tls-key"),
    ),
    "cloud-server": (
        *("--host", "--port", "--gpu", "--cpu", "--import", "--token-file", "--tls-cert", "--tls-key"),
        *("--tls-client-ca", "--make-cert", "--insecure", "--heartbeat"),
    ),
}


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", DESIGNED)
def test_help_lists_every_option_and_its_default(script, flag):
    ended = run(script, flag)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(f"Usage: {script}")
    assert [name for name in DESIGNED[script] if name not in ended.out] == []
    assert "7433" in ended.out


@pytest.mark.parametrize("command", [(), ("flops",), ("calibrate",)], ids=["training", "flops", "calibrate"])
def test_help_shows_examples_on_lines_of_their_own(command):
    ended = run("edge-client", *command, "--help")
    assert re.search(r"\n +edge-client .*--compress conv\b", ended.out)
    assert "\\b" not in ended.out


def test_help_of_the_demo_does_not_ask_for_a_server():
    ended = run("edge-client", "demo", "--help")
    assert (ended.status, ended.err) == (0, "")
    assert "--steps" in ended.out
    assert "--server" not in ended.out


@pytest.mark.parametrize(
    "arguments", [("--help",), (), ("--chunk", "1")], ids=["help", "nothing", "a mistake"]
)
def test_command_line_is_answered_without_loading_torch(arguments):
    script = (
        "import sys\nfrom edge.cli import main\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules, 'torch was loaded'"
    )
    ended = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert "torch was loaded" not in ended.stderr
    assert ended.returncode == (0 if arguments == ("--help",) else 2)


# What only a library's user can get wrong.


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("cloud", ("cloud", 7433)),
        ("cloud:1", ("cloud", 1)),
        ("[fd00::5]:65535", ("fd00::5", 65535)),
        ("[fd00::5]", ("fd00::5", 7433)),
        ("10.0.0.5", ("10.0.0.5", 7433)),
    ],
)
def test_address_is_a_host_and_perhaps_a_port(text, address):
    assert parse_address(text) == address


def test_file_that_may_not_be_written_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=r"--save .*may not be written"):
        TrainConfig(server="cloud", save=tmp_path / "model.safetensors")
