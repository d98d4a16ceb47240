"""Threads that are quiet at the same time take nothing from each other or from the screen."""

import sys
import threading

from nnunet_calib.data.quiet import quiet


def test_threads_that_overlap_leave_standard_output_as_it_was(capsys):
    before, inside, leave = sys.stdout, threading.Barrier(3), [threading.Event(), threading.Event()]
    heard: dict[int, str] = {}

    def work(number: int) -> None:
        with quiet() as buffer:
            inside.wait(10)
            print("from thread", number)
            leave[number].wait(10)
            heard[number] = buffer.getvalue()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    inside.wait(10)
    print("seen")
    # the first to come is the first to go: contextlib.redirect_stdout would leave the buffer of the other
    for event, thread in zip(leave, threads, strict=True):
        event.set()
        thread.join(10)
    print("seen too")
    assert sys.stdout is before
    assert capsys.readouterr().out == "seen\nseen too\n"
    assert heard == {0: "from thread 0\n", 1: "from thread 1\n"}


def test_quiet_within_quiet(capsys):
    with quiet() as outer:
        print("a")
        with quiet() as inner:
            print("b")
        print("c")
    assert (outer.getvalue(), inner.getvalue()) == ("a\nc\n", "b\n")
    print("d")
    assert capsys.readouterr().out == "d\n"
