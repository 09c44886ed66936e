"""HTTP: the only package that imports starlette."""

from redismem.http.app import create_app, worker_app

__all__ = ["create_app", "worker_app"]
