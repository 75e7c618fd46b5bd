"""Threads that hash and write beside one another: order, errors, and an end of the process that waits for none."""

import subprocess
import sys
import threading
import time

import pytest

from trainers.store.background_threads import map_beside, start_beside


def test_results_come_in_order_and_so_many_run_at_once() -> None:
    running, most = [0], [0]
    lock = threading.Lock()

    def work(number: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02 * (number % 3))
        with lock:
            running[0] -= 1
        return number

    assert list(map_beside(work, range(12), 2)) == list(range(12))
    assert most == [2]


def test_an_error_is_raised_once_nothing_is_under_way() -> None:
    ended: list[int] = []

    def work(number: int) -> None:
        if number == 1:
            raise OSError("no room")
        time.sleep(0.1)
        ended.append(number)

    with pytest.raises(OSError, match="no room"):
        list(map_beside(work, range(9), 2))
    assert ended == [0, 2]


def test_the_end_of_a_process_waits_for_no_thread() -> None:
    module = "trainers.store.background_threads"
    code = f"import time; from {module} import start_beside; start_beside(lambda: time.sleep(60)); print(1)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "1\n", "")


def test_a_result_is_waited_for() -> None:
    assert start_beside(lambda: time.sleep(0.05) or 7).result() == 7
