"""A client of the service: async, typed, light to import; its errors are those of `redismem.errors`."""

from redismem.sdk.client import Client
from redismem.sdk.sessions import SessionHandle
from redismem.sdk.streams import ContextStream
from redismem.sdk.users import UserMemory

__all__ = ["Client", "ContextStream", "SessionHandle", "UserMemory"]
