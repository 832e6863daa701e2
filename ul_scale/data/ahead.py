"""An iterator whose items are made ahead of time, in a thread."""

import queue
import threading
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")


def ahead(
    source: Generator[T, None, None], depth: int, abort: Callable[[], object] = lambda: None
) -> Generator[T, None, None]:
    """Yield what ``source`` yields, made ahead in a thread that ends with this iterator.

    Args:
        source: what it raises is raised here.
        depth: items that are held ready.
        abort: called when the iterator is closed or dropped; makes ``source`` come back if it is waiting.
    """
    items: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: tuple[T] | BaseException | None) -> None:
        while not stop.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                pass

    def work() -> None:
        try:
            for item in source:
                put((item,))
                if stop.is_set():
                    break
            source.close()
            put(None)
        except BaseException as error:  # it belongs to whoever waits for the item
            put(error)

    thread = threading.Thread(target=work, name="ul-scale-ahead", daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        stop.set()
        abort()
        if thread is not threading.current_thread():
            thread.join(timeout=10)
