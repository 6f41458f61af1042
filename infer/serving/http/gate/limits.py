"""What a client may take, and the names that mean this machine."""

from __future__ import annotations

import dataclasses
import ipaddress


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may take.

    Attributes:
      body_bytes: of a request.
      headers: of a request.
      connections: at once.
      header_seconds, body_seconds: in which a request's headers, and its body, have to be there.
      write_seconds: after so many in which a client reads nothing, it is dropped.
      request_seconds: after so many from its arrival on, an answer ends as it is.
      keep_alive: seconds between the comments of a stream that has nothing to say.
      answer_tokens: the most tokens of an answer.
      choices: the most answers to a request, those to all of its prompts together, and those of best_of included.
      messages: of a conversation.
      tools: of a request.
    """

    body_bytes: int = 4 << 20
    headers: int = 64
    connections: int = 256
    header_seconds: float = 10
    body_seconds: float = 30
    write_seconds: float = 20
    request_seconds: float = 600
    keep_alive: float = 15
    answer_tokens: int = 1 << 20
    choices: int = 16
    messages: int = 2048
    tools: int = 128


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    if host.startswith("["):  # an address of IPv6
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def is_loopback(name: str) -> bool:
    """Whether a name or an address means this machine, whatever name servers say."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
