"""A slow worker says so, and the paces of all arrive with a sum that a step makes anyway."""

import torch

from mlc_ray.train import slow
from mlc_ray.train.loop import StepMeter
from mlc_ray.train.slow import WINDOW, SlowWorkers
from tests.train.tiny import on_workers, random_rows, run_engine, tiny_config


def said_by(caplog, rank, paces, steps=WINDOW):
    worker = SlowWorkers(rank)
    caplog.clear()
    for step in range(steps):
        worker.add([pace * (1 + step % 2) for pace in paces])  # steps of different length
    return caplog.text


def test_the_slow_worker_alone_says_so_once_a_minute(caplog, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(slow.time, "monotonic", lambda: clock[0])
    paces = [1.0, 1.0, 1.4, 1.2]
    assert "rank 2 on " in said_by(caplog, 2, paces)
    assert "1.4 times as long in forwards as the median of 4 workers" in caplog.text
    assert not any(said_by(caplog, rank, paces) for rank in (0, 1, 3))
    assert not said_by(caplog, 2, paces, steps=WINDOW - 1)
    assert "1.5 times" in said_by(caplog, 1, [1.0, 1.5])
    assert not said_by(caplog, 0, [1.0, 1.5]) and not said_by(caplog, 0, [1.0])
    worker = SlowWorkers(1)
    caplog.clear()
    for _ in range(WINDOW + 5):
        worker.add([1.0, 2.0])
    assert caplog.text.count("rank 1") == 1
    clock[0] += 60
    worker.add([1.0, 2.0])
    assert caplog.text.count("rank 1") == 2


def paces_of_two_steps(rank):
    paces, plain = [], StepMeter.reduce

    def reduce(meter, *arguments, **named):
        metrics = plain(meter, *arguments, **named)
        paces.append((meter.paces, meter.forwarding.seconds() / meter.numbers["tokens"]))
        return metrics

    StepMeter.reduce = reduce
    run_engine(tiny_config(objective={"loss": "simpo"}), random_rows(8), 2)
    return paces


def test_every_worker_learns_the_paces_of_all(tmp_path):
    first, second = on_workers(2, paces_of_two_steps, tmp_path)
    for (paces, own), (others_paces, other) in zip(first, second, strict=True):
        assert paces == others_paces
        assert torch.allclose(torch.tensor(paces), torch.tensor([own, other])) and own > 0 and other > 0
