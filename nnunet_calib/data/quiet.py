"""What other libraries print, kept from the screen, one thread at a time.

``contextlib.redirect_stdout`` exchanges ``sys.stdout`` for all threads: two of them that overlap leave the second's
buffer in its place, and nothing is printed any more.
"""

import contextlib
import io
import sys
import threading
from collections.abc import Iterator
from typing import Any

_lock = threading.Lock()
_buffers: dict[int, list[io.StringIO]] = {}
_standing: "_ByThread | None" = None
_itk_warned = False


class _ByThread:
    """Standard output in which threads that are quiet write to buffers of their own."""

    def __init__(self, stream: Any):
        self.stream = stream

    def _here(self) -> Any:
        own = _buffers.get(threading.get_ident())
        return own[-1] if own else self.stream

    def write(self, text: str) -> int:
        """As of a stream."""
        return self._here().write(text)

    def flush(self) -> None:
        """As of a stream."""
        self._here().flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._here(), name)


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Within it, what this thread prints goes into the buffer it is given; other threads print as before.

    ITK's warnings, which go past Python, are not shown while any thread is quiet.
    """
    global _standing, _itk_warned
    buffer, me = io.StringIO(), threading.get_ident()
    with _lock:
        if not _buffers:
            _itk_warned = _itk_warns(False)
        _buffers.setdefault(me, []).append(buffer)
        if _standing is None or sys.stdout is not _standing:
            _standing = _ByThread(sys.stdout)
            sys.stdout = _standing
    try:
        yield buffer
    finally:
        with _lock:
            _buffers[me].pop()
            if not _buffers[me]:
                del _buffers[me]
            if not _buffers:
                _itk_warns(_itk_warned)
            if not _buffers and _standing is not None and sys.stdout is _standing:
                sys.stdout, _standing = _standing.stream, None


def _itk_warns(shown: bool) -> bool:
    """Switch ITK's warnings on or off; returns whether they were on."""
    itk = sys.modules.get("SimpleITK")
    if itk is None:
        return shown
    before = itk.ProcessObject.GetGlobalWarningDisplay()
    itk.ProcessObject.SetGlobalWarningDisplay(shown)
    return before
