"""What a broker does without storing anything: live messages, requests, and answering them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from nats import errors as nats_errors

from flame.broker import fast
from flame.broker.errors import NotAcknowledged
from flame.broker.fast import Sender
from flame.broker.seam import LiveHandler, LiveMessage, RequestHandler, SubjectHandler, Subscription
from flame.broker.wire import STORED_SUBJECT, map_client_error, request
from flame.cancel import end_tasks
from flame.logs import get_logger

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription as NatsSubscription
    from nats.micro.request import Request
    from nats.micro.service import Service

log = get_logger("flame.broker")

SERVICE_STOP_S: Final = 2.0


class LiveBroker:
    """One connection to NATS; see `flame.broker.seam.Broker` for what each operation does."""

    def __init__(self, client: Client) -> None:
        """Use a client, which need not be connected yet."""
        self._nc = client
        self._sender: Sender
        """There from when it is connected."""
        self._answering: set[asyncio.Task[None]] = set()
        self._asking: set[asyncio.Future[None]] = set()
        """One for each request under way, done when its answer can't come any more."""

    def lose_requests(self) -> None:
        """Tell whoever waits for an answer that it can't come any more: the connection was lost meanwhile."""
        for lost in self._asking:
            if not lost.done():
                lost.set_result(None)

    async def answer_no_more(self) -> None:
        """End what is being answered."""
        await end_tasks(self._answering)

    async def publish(self, subject: str, data: bytes) -> None:
        """See `flame.broker.seam.Broker.publish`."""
        try:
            self._sender.send(subject, data)
            if self._sender.full:
                await self._sender.room()
        except (nats_errors.Error, OSError) as error:
            raise map_client_error(f"publish on {subject}", error) from error

    async def subscribe(self, subject: str, handler: LiveHandler) -> Subscription:
        """See `flame.broker.seam.Broker.subscribe`."""

        def on_message(subject: bytes, _reply: bytes, data: bytes, headers: bytes) -> None:
            stored_as = fast.header(headers, STORED_SUBJECT) if headers else ""
            handler(LiveMessage(subject.decode(), data, stored_as))

        try:
            return _Subscription(await fast.subscribe(self._nc, subject, on_message))
        except (nats_errors.Error, OSError) as error:
            raise map_client_error(f"subscribe to {subject}", error) from error

    async def first(self, subject: str) -> tuple[asyncio.Future[bytes], Subscription]:
        """See `flame.broker.seam.Broker.first`."""
        try:
            future, subscription = await fast.first(self._nc, subject)
        except (nats_errors.Error, OSError) as error:
            raise map_client_error(f"subscribe to {subject}", error) from error
        return future, _Subscription(subscription)

    async def request(self, subject: str, data: bytes, timeout_s: float) -> bytes:
        """See `flame.broker.seam.Broker.request`."""
        answer: bytes = (await self._ask(subject, data, timeout_s, f"request to {subject}")).data
        return answer

    async def _ask(self, subject: str, data: bytes, timeout_s: float, what: str) -> Msg:
        """Request, and hear of it at once when the answer can't come any more."""
        loop = asyncio.get_running_loop()
        lost: asyncio.Future[None] = loop.create_future()
        asked: asyncio.Task[Msg] = loop.create_task(request(self._nc, subject, data, timeout_s, what))
        self._asking.add(lost)
        try:
            await asyncio.wait((asked, lost), return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                raise NotAcknowledged(f"{what}: the connection was lost meanwhile; it may have been carried out")
            return asked.result()
        finally:
            self._asking.discard(lost)
            lost.cancel()
            if not asked.cancel() and not asked.cancelled():
                asked.exception()  # told already, or nobody is there to be told

    async def answer(self, subject: str, handler: SubjectHandler) -> Subscription:
        """See `flame.broker.seam.Broker.answer`."""

        async def on_message(msg: Msg) -> None:
            self._spawn(self._answer(msg, handler))

        return _Subscription(await self._subscribe(subject, cb=on_message))

    async def serve(self, name: str, version: str, prefix: str, verbs: Mapping[str, RequestHandler]) -> Subscription:
        """See `flame.broker.seam.Broker.serve`."""
        from nats.micro import add_service  # noqa: PLC0415  # only schedulers serve

        try:
            service = await add_service(self._nc, name=name, version=version)
            for verb, handler in verbs.items():
                endpoint = self._endpoint_of(handler)
                await service.add_endpoint(name=verb, subject=f"{prefix}.{verb}", handler=endpoint)
        except (nats_errors.Error, OSError) as error:
            raise map_client_error(f"serve {prefix}", error) from error
        return _Service(service)

    def _endpoint_of(self, handler: RequestHandler) -> Callable[[Request], Any]:
        async def respond(call: Request) -> None:
            with contextlib.suppress(nats_errors.Error):
                await call.respond(await handler(call.data))

        async def endpoint(call: Request) -> None:
            self._spawn(respond(call))

        return endpoint

    async def _answer(self, msg: Msg, handler: SubjectHandler) -> None:
        answer = await handler(msg.subject, msg.data)
        if msg.reply:
            with contextlib.suppress(nats_errors.Error):
                await self._nc.publish(msg.reply, answer)

    def _spawn(self, coroutine: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._answering.add(task)
        task.add_done_callback(self._answered)

    def _answered(self, task: asyncio.Task[None]) -> None:
        self._answering.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request handler failed", error=repr(error), exc_info=error)

    async def _subscribe(self, subject: str, **options: Any) -> NatsSubscription:
        try:
            return await self._nc.subscribe(subject, **options)
        except (nats_errors.Error, OSError) as error:
            raise map_client_error(f"subscribe to {subject}", error) from error


class _Subscription:
    """A nats-py subscription behind the seam."""

    def __init__(self, subscription: NatsSubscription) -> None:
        self._subscription = subscription

    async def stop(self) -> None:
        with contextlib.suppress(nats_errors.Error, OSError):
            await self._subscription.unsubscribe()


class _Service:
    """A NATS micro service behind the seam."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def stop(self) -> None:
        # It waits for the server to confirm, and a server that is gone never does.
        stopping = asyncio.create_task(self._service.stop())
        await asyncio.wait((stopping,), timeout=SERVICE_STOP_S)
        await end_tasks((stopping,))
        if not stopping.cancelled() and (error := stopping.exception()) is not None:
            log.debug("the service did not stop in order", error=plain(error))


def plain(error: BaseException | None) -> str:
    """Return the text of one of the client's errors."""
    return (str(error) or type(error).__name__).removeprefix("nats: ") if error is not None else "unknown"
