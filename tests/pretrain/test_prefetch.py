import threading
import time
from collections.abc import Iterator

import pytest

from data_prep.cli import Hung
from pretrain import prefetch as prefetch_module
from pretrain.prefetch import Prefetch


def idle() -> str:
    return "doing nothing"


def test_items_come_in_order_until_the_iterator_ends() -> None:
    assert list(Prefetch(iter(range(50)), 3, 10, idle)) == list(range(50))


def test_it_works_ahead_as_far_as_told_on_another_thread() -> None:
    made: list[int] = []
    names = set()

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            names.add(threading.current_thread().name)
            yield number

    ahead = Prefetch(items(), 4, 10, idle)
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(made) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert made == list(range(6))  # one was taken, four are ready, one waits for room
    assert names == {"prefetch"}
    ahead.close()


def test_an_error_comes_in_the_place_of_its_item() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("disk on fire")

    ahead = Prefetch(items(), 4, 10, idle)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="on fire"):
        next(ahead)


def test_waiting_is_counted_reported_and_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(prefetch_module, "REPORT_SECONDS", 0.05)
    gate = threading.Event()

    def items() -> Iterator[int]:
        gate.wait(20)
        yield 1
        threading.Event().wait(20)

    ahead = Prefetch(items(), 1, 2.0, lambda: "reading 000012.tar")
    threading.Timer(0.2, gate.set).start()
    assert next(ahead) == 1
    assert 0.1 < ahead.waited < 2.0
    with pytest.raises(Hung, match=r"no data for 2 s \(data.stall_seconds\): reading 000012.tar"):
        next(ahead)
    assert "waiting for data for 1 s: reading 000012.tar" in capsys.readouterr().err


def test_closing_ends_the_thread_but_not_one_that_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_module, "CLOSE_SECONDS", 0.2)
    ahead = Prefetch(iter(range(100)), 2, 10, idle)
    assert next(ahead) == 0
    ahead.close()
    assert not ahead._thread.is_alive()
    gate = threading.Event()
    stuck = Prefetch((gate.wait(20) for _ in range(1)), 2, 10, idle)
    stuck.close()
    assert stuck._thread.is_alive()
    gate.set()
