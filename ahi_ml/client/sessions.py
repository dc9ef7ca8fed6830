"""Boto3 clients for a data store: the one place that makes them."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from ahi_ml._version import __version__
from ahi_ml.client.failures import ATTEMPTS, translated
from ahi_ml.client.governor import Governor
from ahi_ml.client.single import SingleCalls
from ahi_ml.config import QUOTAS, Quota, rate_limits
from ahi_ml.errors import ConfigError

__all__ = ["AccessKeys", "Connection", "Service", "make_connection", "make_s3_client"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AccessKeys:
    """Keys given outright; without them boto3 looks where it always does."""

    access_key_id: str
    secret_access_key: str

    def __repr__(self) -> str:
        return "AccessKeys(...)"


@dataclass(frozen=True, slots=True)
class Service:
    """Which service endpoint to talk to, and as whom.

    Parameters
    ----------
    region, profile, endpoint_url : str, optional
        As boto3 takes them; None leaves each to boto3's own rules.
    keys : AccessKeys, optional
        Instead of boto3's credential chain.
    config : botocore.config.Config, optional
        What boto3 takes so only, such as a client certificate or proxies; what it says goes before what is said here.
    """

    region: str | None = None
    profile: str | None = None
    endpoint_url: str | None = None
    keys: AccessKeys | None = None
    config: Any = field(default=None, repr=False)  # proxies may have passwords


@dataclass(eq=False)
class Connection:
    """A boto3 client, and what else talks to the service the way it does.

    Parameters
    ----------
    client : boto3 client
        For ``medical-imaging``.
    session : botocore session
        It was made with: credentials and configuration come from it.
    governor : Governor
        How fast requests may go, the client's and others.
    single : SingleCalls
        For a transport that repeats the client's calls itself.
    hooked : bool
        Whether somebody else has registered event handlers on the client: requests must pass them.
    """

    client: Any
    session: Any
    governor: Governor = field(default_factory=Governor)
    single: SingleCalls = field(default_factory=SingleCalls)
    hooked: bool = False

    def __post_init__(self) -> None:
        events = self.client.meta.events
        self.governor.attend(events)
        self.single.attend(events)
        for name in ("register", "register_first", "register_last"):
            setattr(events, name, self._noticing(getattr(events, name)))

    def _noticing(self, register: Callable[..., Any]) -> Callable[..., Any]:
        def registered(*arguments: Any, **options: Any) -> Any:
            self.hooked = True
            return register(*arguments, **options)

        return registered

    def leave(self) -> None:
        """Warn, once a process, that handlers of somebody else's do not go to another process. I/O: none."""
        if self.hooked:
            _warn_of_handlers(os.getpid())


@cache  # one warning a process, a forked child too
def _warn_of_handlers(process: int) -> None:
    _LOG.warning(
        "event handlers of store.client stay in the process that registered them; workers send requests without them: "
        "register them there too (in a DataLoader's worker_init_fn), or read with num_workers=0"
    )


def make_connection(
    service: Service, *, connections: int = 64, limits: Mapping[str, Quota] | None = None
) -> Connection:
    """A ``medical-imaging`` client with its session. I/O: boto3's configuration files; no request.

    Parameters
    ----------
    service : Service
        Endpoint and credentials.
    connections : int
        Size of the connection pool: as many requests as may be in flight.
    limits : mapping of str to Quota, optional
        Quotas to keep, by operation, as `config.rate_limits` gives them, which is also the default. Beyond them,
        endpoints of AWS have the service's own, and others none.

    Raises
    ------
    ConfigError
        No region, no such profile, an endpoint that is no URL, or an ``AHI_ML_RATE_LIMIT`` that is no limit.
    """
    import boto3
    import botocore.session
    from botocore.config import Config

    endpoint = service.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_MEDICAL_IMAGING")
    if endpoint and not re.match(r"https?://[\w.\[]", endpoint):
        raise ConfigError(f"{endpoint!r} is no endpoint: it starts with http:// or https:// and names a host")
    config = Config(
        connect_timeout=5,
        read_timeout=60,
        max_pool_connections=connections,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        tcp_keepalive=True,
        user_agent_extra=f"ahi_ml/{__version__}",
    )
    if service.config is not None:
        config = config.merge(service.config)
    keys = service.keys
    with translated("connect"):
        session = botocore.session.Session(profile=service.profile)
        boto3_session = boto3.session.Session(
            botocore_session=session,
            aws_access_key_id=keys.access_key_id if keys else None,
            aws_secret_access_key=keys.secret_access_key if keys else None,
            region_name=service.region,
        )
        client = boto3_session.client("medical-imaging", endpoint_url=service.endpoint_url, config=config)
        if _is_local(client.meta.endpoint_url):
            # Botocore would put "runtime-" before the host, which no loopback address survives.
            config = config.merge(Config(inject_host_prefix=False))
            client = boto3_session.client("medical-imaging", endpoint_url=service.endpoint_url, config=config)
    limits = rate_limits() if limits is None else limits
    quotas = {**(QUOTAS if _is_aws(client.meta.endpoint_url) else {}), **(limits or {})}
    return Connection(client, session, Governor(quotas, lambda: _account(client, session)))


def make_s3_client(region: str, profile: str | None = None) -> Any:
    """An ``s3`` client by boto3's own rules, whatever keys the data store has. I/O: boto3's configuration files.

    Raises
    ------
    ConfigError
        No such profile.
    """
    import boto3
    from botocore.config import Config

    with translated("connect"):
        session = boto3.session.Session(profile_name=profile)
        config = Config(max_pool_connections=32, retries={"mode": "standard", "total_max_attempts": ATTEMPTS})
        return session.client("s3", region_name=session.region_name or region, config=config)


def _is_local(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return True


def _is_aws(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn", ".api.aws"))


def _account(client: Any, session: Any) -> str:
    """Whose quota requests count against: of the account, when botocore knows it, since each role session has keys."""
    keys = session.get_credentials().get_frozen_credentials()
    url = client.meta.endpoint_url
    return "\0".join(("aws" if _is_aws(url) else url, client.meta.region_name, keys.account_id or keys.access_key))
