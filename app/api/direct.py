"""A short path from a well-formed request to its route function.

FastAPI looks a route up twice and checks each parameter in Python: two thirds of the time of a
read. Here the signatures of the route functions are read once, with the public API of FastAPI and
pydantic. FastAPI itself handles every request that is not well-formed, and every unusual route.
"""

import inspect
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from fastapi import FastAPI, Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, iter_route_contexts
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# A path without parameters, or with one as its last part.
_PATH = re.compile(r"[^{}]*(?:/\{(\w+)\})?")
# Returns an argument of a route function from the request and its body.
Argument = Callable[[Request, bytes], Any]
Dependency = Callable[[Request], Awaitable[Any]]


class _Unusual(Exception):
    """FastAPI has to handle this route or this request."""


class DirectRoutes:
    """Calls the route functions of well-formed requests, and passes all other requests on.

    This works for a function that returns a `Response` and whose parameters are the request,
    dependencies on the request, the last part of the path, headers, a model of the query and a
    model of the JSON body. With `dependency_overrides` all requests are passed on.
    """

    def __init__(self, app: ASGIApp, application: FastAPI) -> None:
        self.app = app
        self._application = application
        # By method and path, with {} as the last part of the path if it is a parameter.
        self._routes: dict[tuple[str, str], tuple[ASGIApp, str | None] | None] = {}
        # As in FastAPI, the first of two routes that match is used. A route with another kind of
        # path, such as a mount, hides each later route whose path begins as its own.
        hidden: list[str] = []
        for context in iter_route_contexts(application.routes):
            path = context.path or ""
            match = _PATH.fullmatch(path)
            if match is None or context.methods is None:
                hidden.append(path.partition("{")[0])
                continue
            parameter = match[1]
            found = None
            if not path.startswith(tuple(hidden)):
                with suppress(_Unusual):
                    route = _DirectRoute(app, context, parameter)
                    handlers = application.exception_handlers
                    found = ExceptionMiddleware(route, handlers=handlers), parameter
            for method in context.methods:
                general = method, f"{path.rpartition('/')[0]}/{{}}"
                if parameter:
                    self._routes.setdefault(general, found)
                else:
                    is_hidden = general in self._routes
                    self._routes.setdefault((method, path), None if is_hidden else found)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._application.dependency_overrides:
            method = scope["method"]
            path = scope["path"].removeprefix(scope["root_path"])
            path_params = {}
            found = self._routes.get((method, path))
            if found is None and (method, path) not in self._routes:
                parent, _, last = path.rpartition("/")
                if last and (found := self._routes.get((method, f"{parent}/{{}}"))):
                    path_params[found[1]] = last
            if found:
                scope["path_params"] = path_params
                await found[0](scope, receive, send)
                return
        await self.app(scope, receive, send)


class _DirectRoute:
    """Calls one route function. Passes a request that is not well-formed on."""

    def __init__(self, app: ASGIApp, context: Any, path_parameter: str | None) -> None:
        """Raise `_Unusual` if FastAPI has to handle the route."""
        self.app = app
        self._route = context.original_route
        # A class of its own may have another handler.
        if type(self._route) is not APIRoute or context.max_body_size is not None:
            raise _Unusual
        self._endpoint = context.endpoint
        self._checks = [_dependency(each) for each in context.dependencies]
        self._arguments: dict[str, Argument] = {}
        self._dependencies: dict[str, Dependency] = {}
        self._has_body = False
        hints = get_type_hints(self._endpoint, include_extras=True)
        returns = hints.get("return")
        is_coroutine = inspect.iscoroutinefunction(self._endpoint)
        if not (is_coroutine and inspect.isclass(returns) and issubclass(returns, Response)):
            raise _Unusual
        for name, parameter in inspect.signature(self._endpoint).parameters.items():
            annotation = hints[name]
            kind, *metadata = (
                get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
            )
            marker = metadata[-1] if metadata else None
            if kind is Request:
                self._arguments[name] = lambda request, _: request
            elif isinstance(marker, params.Depends):
                self._dependencies[name] = _dependency(marker)
            elif name == path_parameter and (not marker or isinstance(marker, params.Path)):
                self._arguments[name] = _from_path(annotation, path_parameter)
            elif isinstance(marker, params.Header):
                default = name.replace("_", "-") if marker.convert_underscores else name
                header = (marker.alias or default).lower()
                self._arguments[name] = _from_header(annotation, header, parameter.default)
            elif isinstance(marker, params.Query) and _is_model(kind):
                self._arguments[name] = _from_query(annotation)
            elif not metadata and _is_model(kind) and not self._has_body:
                self._arguments[name] = _from_body(annotation)
                self._has_body = True
            else:
                raise _Unusual

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self._route
        body = b""
        if self._has_body:
            message = await receive()
            body = message.get("body", b"")
            if message.get("more_body"):
                await self.app(scope, _replay(message, receive), send)
                return
            receive = _replay(message, receive)
        request = Request(scope, receive)
        try:
            for check in self._checks:
                await check(request)
            arguments = {name: get(request, body) for name, get in self._arguments.items()}
        except (_Unusual, ValidationError, RequestValidationError):
            await self.app(scope, receive, send)
            return
        for name, dependency in self._dependencies.items():
            arguments[name] = await dependency(request)
        response: Response = await self._endpoint(**arguments)
        await response(scope, receive, send)


def _replay(message: Message, receive: Receive) -> Receive:
    """Return a function that returns this message first."""
    messages = [message]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _is_model(kind: Any) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def _dependency(depends: params.Depends) -> Dependency:
    dependency: Any = depends.dependency
    function = dependency if inspect.isroutine(dependency) else type(dependency).__call__
    parameters = inspect.signature(dependency).parameters.values()
    takes_request = [each.annotation for each in parameters] == [Request]
    if not (takes_request and inspect.iscoroutinefunction(function)):
        raise _Unusual
    return dependency  # type: ignore[no-any-return]


def _from_path(annotation: Any, name: str) -> Argument:
    validate = TypeAdapter(annotation).validate_python
    return lambda request, _: validate(request.path_params[name])


def _from_header(annotation: Any, name: str, default: Any) -> Argument:
    validate = TypeAdapter(annotation).validate_python
    key = name.encode()

    def get(request: Request, _: bytes) -> Any:
        value = _header(request, key)
        if value is not None:
            return validate(value.decode("latin-1"))
        if default is inspect.Parameter.empty:
            raise _Unusual
        return default

    return get


def _from_query(annotation: Any) -> Argument:
    validate = TypeAdapter(annotation).validate_python
    return lambda request, _: validate(dict(request.query_params))


def _from_body(model: Any) -> Argument:
    validate = TypeAdapter(model).validate_json

    def get(request: Request, body: bytes) -> Any:
        content_type = _header(request, b"content-type") or b""
        if content_type.partition(b";")[0] != b"application/json":
            raise _Unusual
        return validate(body)

    return get


def _header(request: Request, key: bytes) -> bytes | None:
    for name, value in request.scope["headers"]:
        if name == key:
            return value  # type: ignore[no-any-return]
    return None
