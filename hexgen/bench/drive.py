"""Sending the load: open loop at given times, or a closed loop of so many requests at a time."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Sequence

from hexgen.bench.asks import Ask
from hexgen.bench.client import AnswerError, Client
from hexgen.bench.record import Outcome, Record

OnDone = Callable[[Record], None]


async def drive(
    client: Client,
    asks: Sequence[Ask],
    *,
    concurrency: int | None = None,
    most_open: int = 1024,
    timeout_s: float = 600.0,
    stop: asyncio.Event | None = None,
    on_done: OnDone | None = None,
) -> Outcome:
    """Send all of ``asks``, each when it is due, or with ``concurrency`` as soon as one before it has ended.

    At most ``most_open`` are open at once; one that is due beyond that waits, and its record shows it (``due_s``
    before ``sent_s``). Setting ``stop`` ends the run: what is open then is cut off, neither done nor failed.
    """
    stop = stop or asyncio.Event()
    gc.collect()  # a full collection in the middle would be measured as the server's
    started_s = time.perf_counter()
    closed = concurrency is not None
    records = [Record(ask, started_s if closed else started_s + ask.due_s) for ask in asks]

    async def one(record: Record) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await client.answer(record)
            record.completed = True
        except AnswerError as error:
            record.error = str(error)
        except TimeoutError:
            record.error = f"no end within {timeout_s:g} s"
        if on_done is not None:
            on_done(record)

    work = asyncio.create_task(
        _closed(records, one, concurrency) if concurrency is not None else _open(records, one, most_open)
    )
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((work, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopped = not work.done()
        ended_s = time.perf_counter()
    finally:
        for task in (work, stopping):
            task.cancel()
        await asyncio.gather(work, stopping, return_exceptions=True)
    if not stopped:
        work.result()  # a fault of ours, where there is one
    return Outcome(tuple(records), started_s, ended_s, stopped)


async def _open(records: Sequence[Record], one: Callable[[Record], Awaitable[None]], most_open: int) -> None:
    room = asyncio.Semaphore(most_open)

    async def with_room(record: Record) -> None:
        try:
            await one(record)
        finally:
            room.release()

    async with asyncio.TaskGroup() as group:
        for record in records:
            early_s = record.due_s - time.perf_counter()
            if early_s > 0:
                await asyncio.sleep(early_s)
            await room.acquire()
            group.create_task(with_room(record))


async def _closed(records: Sequence[Record], one: Callable[[Record], Awaitable[None]], concurrency: int) -> None:
    left = iter(records)

    async def worker() -> None:
        for record in left:
            record.due_s = time.perf_counter()
            await one(record)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(records))):
            group.create_task(worker())
