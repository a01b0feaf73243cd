"""Trains a middle in a process of its own; prints what it was estimated to take, and what it took."""

import ctypes
import json
import sys

from common.runtime import prepare_process, rss_bytes

prepare_process()

import torch  # noqa: E402

from common.memory import training_bytes  # noqa: E402
from common.model_spec import ModelSpec  # noqa: E402
from common.models import build_model, model_inputs  # noqa: E402
from common.optim import OptimSpec  # noqa: E402
from common.partition import split  # noqa: E402
from common.stage import AMP_DTYPES, Stage  # noqa: E402

CHUNK_SIZE = 8
CUTS = {
    "mobilenet_v2": ("features.0.1", "features.18"),
    "hf:any": ("bert.encoder.layer.0.attention.output.dense", "bert.encoder.layer.3"),
}


def peak_bytes():
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def random_input(info):
    shape = info.batched(CHUNK_SIZE)
    return torch.rand(shape) if info.dtype.is_floating_point else torch.ones(shape, dtype=info.dtype)


def main():
    case = json.loads(sys.argv[1])
    in_flight, amp = case["in_flight"], case.get("amp")
    torch.set_num_threads(2)
    optim = OptimSpec(name="adamw", lr=1e-3)
    spec = ModelSpec(
        name=case["model"],
        num_classes=10,
        image_size=case.get("image_size"),
        config=case.get("config"),
        tokens=128 if "config" in case else None,
    )
    parts = split(build_model(spec), CUTS[spec.name], model_inputs(spec))
    parts.front.free()
    parts.back.free()
    estimate = training_bytes(
        parts.middle,
        parts.cut1,
        chunk_size=CHUNK_SIZE,
        in_flight=in_flight,
        optim=optim,
        amp=AMP_DTYPES[amp] if amp else None,
    )
    needs_grad = [info.requires_grad for info in parts.cut1]
    layout = torch.channels_last if "image_size" in case else torch.contiguous_format
    stage = Stage(
        parts.middle, "middle", seed=0, needs_grad=needs_grad, optim=optim, amp=amp, memory_format=layout
    )
    ctypes.CDLL(None).malloc_trim(0)  # building left memory unused, which training would take and not show
    before = rss_bytes() - estimate.parameters - estimate.buffers // 2
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak from here on
    for step in range(2):
        stage.begin_step()
        held = []
        for chunk in range(in_flight + 1):
            if len(held) == in_flight:
                number, outputs = held.pop(0)
                stage.backward(number, [torch.rand_like(out) for out in outputs])
            held.append((chunk, stage.forward(step, chunk, [random_input(info) for info in parts.cut1])))
        for number, outputs in held:
            stage.backward(number, [torch.rand_like(out) for out in outputs])
        stage.commit()
    sys.stdout.write(json.dumps([estimate.total - estimate.queues, peak_bytes() - before]))


if __name__ == "__main__":
    main()
